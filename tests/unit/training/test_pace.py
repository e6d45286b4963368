"""The seconds of a step, and the reasons of slow ones."""

import logging
from typing import Any

import pytest

from wanlora.foundation.log import log
from wanlora.memory.measure import GIB
from wanlora.training import pace as paces
from wanlora.training.pace import Pace


class Meter:
    """An allocator whose answers are set."""

    num_retries = 0
    num_free = 10 * GIB
    highest = 0

    def allocated(self) -> int:
        return 0

    def peak(self) -> int:
        return 0

    def reset(self) -> None:
        pass

    def take_highest(self) -> int:
        highest, self.highest = self.highest, 3 * GIB
        return highest

    def retries(self) -> int:
        return self.num_retries

    def free(self) -> int:
        return self.num_free


class Walk:
    """Steps on a clock that is set."""

    def __init__(self, meter: Meter | None = None) -> None:
        self.now = 0.0
        self.pace = Pace(meter, clock=lambda: self.now)

    def step(self, seconds: float = 1.0, *, sizes: str = "a", before: float = 0.0, waiting: float = 0.0) -> Any:
        self.now += before
        self.pace.begin()
        self.now += waiting
        self.pace.loaded()
        self.now += seconds - waiting
        return self.pace.judge(self.pace.finish(sizes))


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(log, "propagate", True)
    monkeypatch.setattr(paces, "driver_spills", lambda: False)
    caplog.set_level(logging.WARNING, logger="wanlora")
    return caplog


def test_seconds_are_those_of_the_step_alone() -> None:
    walk = Walk()
    assert walk.step(1.5, waiting=0.5) == {"seconds": 1.5}
    assert walk.step(2.0, before=60.0) == {"seconds": 2.0}
    walk, meter = Walk(None), Meter()
    walk.pace.meter, meter.highest = meter, 20 * GIB  # a preview's
    assert walk.step(1.0) == {"seconds": 1.0, "memory/peak_gib": 3.0}


def test_a_slow_step_is_told_with_its_figures(said: pytest.LogCaptureFixture) -> None:
    walk = Walk()
    for _ in range(6):
        walk.step(1.0, sizes="768x416x21")
    walk.step(2.9, sizes="768x416x21")
    assert not said.messages
    walk.step(4.2, sizes="768x416x21")
    (message,) = said.messages
    assert message.startswith("a step on 768x416x21 took 4.2 s, 4 times as long as usual (1.00 s): ")


def test_steps_are_compared_with_those_of_their_sizes_once_there_are_some(said: pytest.LogCaptureFixture) -> None:
    walk = Walk()
    for _ in range(4):
        walk.step(1.0)
    walk.step(30.0)
    for _ in range(6):
        walk.step(30.0, sizes="b")
    for _ in range(6):
        walk.step(0.01, sizes="c")
    walk.step(0.5, sizes="c")
    assert not said.messages


def slow(walk: Walk, *, before: float = 0.0, waiting: float = 0.0) -> None:
    for _ in range(6):
        walk.step(1.0)
    walk.step(9.0, before=before, waiting=waiting)


def test_each_reason_is_told_once(said: pytest.LogCaptureFixture) -> None:
    walk = Walk()
    for _ in range(3):
        slow(walk)
        slow(walk, waiting=6.0)
        slow(walk, before=5.0)
    assert len(said.messages) == 3
    assert "outside of this program" in said.messages[0]
    assert "waited for its batch" in said.messages[1] and "--max_data_loader_n_workers" in said.messages[1]
    assert "first after a preview" in said.messages[2]


def test_an_allocator_at_its_limit_is_a_reason(said: pytest.LogCaptureFixture) -> None:
    meter = Meter()
    walk = Walk(meter)
    for _ in range(6):
        walk.step()
    walk.pace.begin()
    meter.num_retries = 2
    walk.now += 9.0
    walk.pace.judge(walk.pace.finish("a"))
    assert "had to be rearranged" in said.messages[0] and "--activation_memory" in said.messages[0]


def test_a_driver_that_spills_is_a_reason(said: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paces, "driver_spills", lambda: True)
    meter = Meter()
    slow(Walk(meter))
    meter.num_free = GIB // 10
    slow(Walk(meter))
    assert "outside of this program" in said.messages[0]
    assert "moves it to the system" in said.messages[1] and "--vram_reserve" in said.messages[1]


def test_compiling_is_a_reason(said: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    compilations = iter([*[0] * 14, 1])
    monkeypatch.setattr(paces, "compilations", lambda: next(compilations))
    slow(Walk())
    assert "were compiled" in said.messages[0]
