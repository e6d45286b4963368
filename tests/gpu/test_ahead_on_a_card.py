"""Steps that are queued ahead: the host never waits, and what is not sound changes nothing."""

from collections.abc import Callable

import pytest
import torch
from bitsandbytes.optim import AdamW8bit
from torch import Tensor

from tests.gpu.test_graphs_on_a_card import SMALL, Run
from wanlora.training.position import Position
from wanlora.training.step import DivergedError, IndexedBatch, QueuedStep

pytestmark = pytest.mark.gpu


def queue(run: Run, number: int, *, broken: bool = False) -> QueuedStep:
    """A step and its update, unread."""
    batch = run._batch(number, SMALL)
    if broken:
        batch.latents_BCFHW.fill_(float("inf"))
    queued = run.step.queue([IndexedBatch(number, batch)], Position(step=number), 1)
    copies = run.step.copies()
    assert copies is not None
    run.step.update_unread(queued, copies)
    return queued


def first_steps(run: Run) -> None:
    """Until everything is there that later steps only use."""
    run.take([SMALL] * 3)
    assert run.step.copies() is not None
    for number in range(3, 6):
        run.step.read(queue(run, number))


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, AdamW8bit])
def test_the_host_waits_for_nothing_before_it_reads(
    optimizer: Callable[..., torch.optim.Optimizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(replays=False, optimizer=optimizer)
    first_steps(run)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "synchronize", _refuse)
        torch.cuda.set_sync_debug_mode("error")
        try:
            queued = [queue(run, number) for number in range(6, 10)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(run.step.read(step).loss > 0 for step in queued)


def _refuse(device: object = None) -> None:
    raise AssertionError("the host waits for the card")


def test_the_numbers_are_those_of_steps_that_are_read_at_once() -> None:
    ahead, plain = Run(replays=False), Run(replays=False)
    for run in (ahead, plain):
        first_steps(run)
    queued = [queue(ahead, number) for number in range(6, 12)]
    expected = [plain.step.read(queue(plain, number)) for number in range(6, 12)]
    assert [ahead.step.read(step) for step in queued] == expected
    assert all(map(torch.equal, ahead.weights, plain.weights))


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, AdamW8bit])
def test_weights_and_states_are_those_before_a_step_that_is_not_sound(
    optimizer: Callable[..., torch.optim.Optimizer],
) -> None:
    run = Run(replays=False, optimizer=optimizer)
    first_steps(run)

    def everything() -> list[Tensor]:
        states = run.step.optimizer.state.values()
        tensors = [value for state in states for value in state.values() if isinstance(value, Tensor)]
        return [*run.weights, *(tensor.clone() for tensor in tensors if tensor.is_cuda)]

    before = everything()
    queued = [queue(run, 6, broken=True), queue(run, 7), queue(run, 8)]
    with pytest.raises(DivergedError):
        run.step.read(queued[0])
    assert all(map(torch.equal, everything(), before))
