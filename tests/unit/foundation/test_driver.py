"""Waking NVIDIA's driver while something else is done. The driver is a simulated one."""

import ctypes
import os
import threading
from typing import Any

import pytest

from wanlora.foundation import driver
from wanlora.foundation.driver import finding_cards, starting_card


class Library:
    """What is called of libcuda."""

    def __init__(self, events: list[object], missing: set[int] = frozenset()) -> None:  # type: ignore[assignment]
        self.events = events
        self.missing = missing
        self.go = threading.Event()

    def cuInit(self, flags: int) -> int:
        assert threading.current_thread() is not threading.main_thread()
        self.go.wait(10)
        self.events.append("cards")
        return 0

    def cuDeviceGet(self, card: Any, index: int) -> int:
        card._obj.value = 7 + index
        return 101 if index in self.missing else 0

    def cuDevicePrimaryCtxRetain(self, context: Any, card: ctypes.c_int) -> int:
        self.events.append(card.value)
        return 0


@pytest.fixture
def events() -> list[object]:
    return []


@pytest.fixture
def library(events: list[object], monkeypatch: pytest.MonkeyPatch) -> Library:
    made = Library(events, missing={3})
    monkeypatch.setattr(driver.ctypes, "CDLL", lambda name: made)
    return made


def test_the_driver_finds_cards_meanwhile_and_has_when_the_block_is_left(
    library: Library, events: list[object]
) -> None:
    with finding_cards():
        events.append("meanwhile")
        library.go.set()
    assert events == ["meanwhile", "cards"]


def test_a_card_is_started_meanwhile_also_if_something_goes_wrong(library: Library, events: list[object]) -> None:
    with pytest.raises(KeyError), starting_card(1):
        events.append("meanwhile")
        library.go.set()
        raise KeyError
    assert events == ["meanwhile", "cards", 8]


@pytest.mark.parametrize(("wanted", "given", "found"), [(True, "", "4x"), (True, "1x", "1x"), (False, "", None)])
def test_the_driver_can_be_given_many_kernels_unless_the_user_says_otherwise(
    library: Library, monkeypatch: pytest.MonkeyPatch, wanted: bool, given: str, found: str | None
) -> None:
    monkeypatch.setenv("CUDA_SCALE_LAUNCH_QUEUES", given)
    if not given:
        monkeypatch.delenv("CUDA_SCALE_LAUNCH_QUEUES")
    library.go.set()
    with finding_cards(wanted=wanted):
        assert os.environ.get("CUDA_SCALE_LAUNCH_QUEUES") == found


def test_without_a_card_to_use_nothing_is_asked_of_the_driver(library: Library, events: list[object]) -> None:
    with finding_cards(wanted=False), starting_card(None):
        pass
    assert not events


def test_a_card_that_the_driver_does_not_have_is_left_to_pytorch(library: Library, events: list[object]) -> None:
    library.go.set()
    with starting_card(3):
        pass
    assert events == ["cards"]


def test_a_machine_without_the_driver_is_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    failed: list[object] = []

    def missing(name: str) -> None:
        asked.append(name)
        raise OSError("no such library")

    monkeypatch.setattr(driver.ctypes, "CDLL", missing)
    monkeypatch.setattr(threading, "excepthook", failed.append)
    with finding_cards(), starting_card(0):
        pass
    assert len(asked) == 2 and not failed
