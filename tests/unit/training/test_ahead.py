"""Updates that take themselves back, and numbers that are read later."""

import logging
from collections.abc import Callable
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tests.unit.training.parts import CPU, Velocity, indexed, measure, step_of
from wanlora.config.train import NetworkConfig, TrainConfig
from wanlora.foundation.log import log
from wanlora.foundation.ranks import Rank
from wanlora.training.ahead import READ_AT_ONCE, Reading, TakenBack, steps_ahead
from wanlora.training.position import Position


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level(logging.INFO, logger="wanlora")
    return caplog


SOUND, BROKEN = torch.tensor([0.5, 1.0]), torch.tensor([0.5, float("nan")])


class Counting(torch.optim.SGD):
    """Remembers a number of its own beside tensors, and swaps two of these at every step."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["steps"] = group.get("steps", 0) + 1
            for parameter in group["params"]:
                state = self.state[parameter]
                state["calls"] = state.get("calls", 0) + 1
                older, newer = state.get("newer", torch.zeros_like(parameter)), parameter.grad.clone()
                state["older"], state["newer"] = older, newer
        return super().step(closure)


def adam(parameters: list[nn.Parameter]) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1)


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "AdamW": adam,
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "RMSprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.1),
    "counting": lambda parameters: Counting(parameters, lr=0.1),
}


class Updates:
    """Two parameters, their optimizer, and updates of them."""

    def __init__(self, make: Callable[[list[nn.Parameter]], Optimizer]) -> None:
        generator = torch.Generator().manual_seed(0)
        self.parameters = [nn.Parameter(torch.randn(3, 2, generator=generator)) for _ in range(2)]
        self.optimizer = make(self.parameters)
        self.taken_back = TakenBack(self.optimizer, self.parameters, CPU)

    def step(self, seed: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters:
            parameter.grad = torch.randn(3, 2, generator=generator)
        self.optimizer.step()

    @property
    def all(self) -> tuple[Any, list[Tensor]]:
        return deepcopy((self.optimizer.state_dict(), [parameter.detach() for parameter in self.parameters]))


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_sound_updates_are_as_ever(name: str) -> None:
    plain, held = Updates(OPTIMIZERS[name]), Updates(OPTIMIZERS[name])
    for updates in (plain, held):
        updates.step(0)
    for seed in (1, 2):
        plain.step(seed)
        held.taken_back.update(lambda seed=seed: held.step(seed), SOUND, held.taken_back.copies())  # type: ignore[misc]
    assert same(plain.all, held.all)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_update_that_is_not_sound_and_all_after_it_change_nothing(name: str) -> None:
    updates = Updates(OPTIMIZERS[name])
    updates.step(0)
    before = updates.all
    host_state = updates.taken_back.update(updates.step, BROKEN, updates.taken_back.copies())
    updates.taken_back.update(updates.step, SOUND, updates.taken_back.copies())
    assert same(before[1], updates.all[1])
    if name == "counting":  # on the host, which does not know yet
        assert not same(before, updates.all)
    updates.taken_back.put_back(host_state)
    assert same(before, updates.all)


@pytest.mark.parametrize("sound", [True, False])
def test_memory_of_any_size_and_order_is_put_back_to_the_bit(sound: bool) -> None:
    optimizer = Counting([nn.Parameter(torch.zeros(2))], lr=0.1)
    states = [
        torch.arange(24, dtype=torch.uint8),
        torch.arange(7, dtype=torch.uint8),
        torch.arange(25, dtype=torch.uint8)[1:],
        torch.randn(4, 6).T,
        torch.randn(4, 6)[:, ::2],
        torch.tensor([float("nan"), -0.0, float("inf"), 1.0]),
        torch.tensor(3.0),
    ]
    optimizer.state[optimizer.param_groups[0]["params"][0]] = dict(enumerate(states))
    taken_back = TakenBack(optimizer, [], CPU)
    before = [state.clone() for state in states]

    def update() -> None:
        for state in states:
            state.add_(1)

    taken_back.update(update, SOUND if sound else BROKEN, taken_back.copies())
    expected = [state + 1 for state in before] if sound else before
    assert all(map(_same_bits, states, expected))


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8))


def test_what_an_update_changes_is_not_known_before_the_first() -> None:
    updates = Updates(adam)
    assert not updates.taken_back.is_possible
    for parameter in updates.parameters:  # as schedule-free optimizers do when they are told to train
        assert not updates.optimizer.state[parameter]
    assert not updates.taken_back.is_possible
    updates.step()
    assert updates.taken_back.is_possible


@pytest.mark.parametrize(
    ("place", "value"), [("state", [torch.zeros(2)]), ("state", {"a": torch.zeros(2)}), ("group", torch.ones(()))]
)
def test_optimizers_that_keep_what_cannot_be_copied_here_are_left_alone(place: str, value: Any) -> None:
    updates = Updates(adam)
    updates.step()
    (updates.optimizer.state[updates.parameters[0]] if place == "state" else updates.optimizer.param_groups[0])[
        "odd"
    ] = value
    assert not updates.taken_back.is_possible


def test_many_tensors_are_not_copied_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    updates = Updates(adam)
    updates.step()
    monkeypatch.setattr("wanlora.training.ahead.MOST_TENSORS", 2 + 6)
    assert updates.taken_back.is_possible  # two parameters, and three values for each
    monkeypatch.setattr("wanlora.training.ahead.MOST_TENSORS", 2 + 5)
    assert not updates.taken_back.is_possible


def test_what_keeps_steps_from_being_queued_ahead_is_said_after_the_first_update(
    said: pytest.LogCaptureFixture,
) -> None:
    step = step_of(Velocity())  # plain descent remembers nothing
    assert step.copies() is None and not said.messages
    measure(step, indexed([0]), Position(), 1)
    step.update(Position())
    assert step.copies() is None and step.copies() is None
    (message,) = set(said.messages)
    assert message == f"{READ_AT_ONCE}: updates of SGD cannot be taken back"


def test_numbers_are_those_of_the_moment_they_were_sent() -> None:
    values = torch.tensor([1.5, 2.0])
    reading = Reading.of(values)
    values.zero_()
    assert reading.get() == [1.5, 2.0]


@pytest.mark.parametrize(
    ("device", "processes", "norms", "steps"),
    [("cuda", 1, None, 2), ("cpu", 1, None, 0), ("cuda", 2, None, 0), ("cuda", 1, 1.0, 0)],
)
def test_steps_are_queued_ahead_on_a_card_unless_something_reads_each(
    device: str, processes: int, norms: float | None, steps: int, said: pytest.LogCaptureFixture
) -> None:
    engine: Any = SimpleNamespace(device=torch.device(device), rank=Rank(0, processes))
    config = TrainConfig(network=NetworkConfig(scale_weight_norms=norms))
    assert steps_ahead(config, engine) == steps
    assert bool(said.messages) == (device == "cuda" and steps == 0)
