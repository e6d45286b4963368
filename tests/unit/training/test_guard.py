"""Passes that run out of memory: what is done about it, and that the run is the same."""

import logging
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn

from tests.unit.memory.wan import adapted_wan
from tests.unit.quantization.test_fast_linear import make_linear
from tests.unit.training.parts import CPU, Velocity, batch, indexed, measure, step_of
from wanlora.data.dataset import Batch
from wanlora.foundation import log as logs
from wanlora.memory.checkpointing import Recompute
from wanlora.memory.keeping import Keeping
from wanlora.memory.outlook import Load
from wanlora.memory.streaming import BlockStream
from wanlora.models.wan.transformer import WanTransformer
from wanlora.quantization.transposed import TransposedWeights
from wanlora.training import guard as guards
from wanlora.training.guard import MemoryGuard, bucket_name, describe, load_of
from wanlora.training.position import Position

BATCH = batch(0)
OTHER = load_of(batch(0, 3))


class Card:
    """A Wan whose blocks run out of memory while more than `capacity` of them are on the card or keep things."""

    def __init__(
        self,
        capacity: int,
        *,
        num_streamed: int = 0,
        everything: bool = True,
        retry: bool = True,
        by_size: Mapping[Load, int] | None = None,
    ) -> None:
        self.model = adapted_wan(6, dropout=0.5)
        blocks = list(self.model.blocks)
        self.stream = BlockStream(blocks, num_streamed, CPU)
        self.recompute = Recompute(blocks, stream=self.stream)
        self.stream.attach()
        self.keeping = Keeping(len(self.recompute.optional), 6, everything=everything)
        self.recompute.keep = self.keeping
        self.model.run_block = self.recompute
        self.guard = MemoryGuard(
            CPU, keeping=self.keeping, recompute=self.recompute, stream=self.stream, by_size=by_size, retry=retry
        )
        self.capacity = capacity
        self.failures = 0
        self.layers = [make_linear(16, 32) for _ in range(2)]
        self.guard.transposed = TransposedWeights([self.layers])
        self.model.blocks[2].register_forward_hook(self._fail)

    def _fail(self, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        copies = 3 if self.guard.transposed.are_kept else 0
        there = self.stream.num_resident + max(self.stream.ring_size - 2, 0)
        if self.keeping.kept.blocks + there + copies > self.capacity:
            self.failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def step(self, batches: Sequence[Batch] = ()) -> list[float]:
        """The loss and every value of the gradient, after one guarded pass, said to be on `batches`."""
        return gradients_of(
            self.model, lambda passes: self.guard.run(passes, lambda: drop(self.model), batches), self.guard
        )


def drop(model: WanTransformer) -> None:
    for parameter in model.parameters():
        parameter.grad = None


def gradients_of(model: WanTransformer, run: Callable[[Callable[[], float]], float], guard: MemoryGuard) -> list[float]:
    def passes() -> float:
        total = 0.0
        for number in range(2):
            torch.manual_seed(number)
            with guard.batch(BATCH):
                x = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(number))
                loss = model(x, torch.tensor([300.0]), [torch.ones(5, 32)]).square().mean()
                loss.backward()
            total += loss.item()
        return total

    total = run(passes)
    return [total, *(v for p in model.parameters() if p.grad is not None for v in p.grad.flatten().tolist())]


def undisturbed() -> list[float]:
    model = adapted_wan(6, dropout=0.5)
    return gradients_of(model, lambda passes: passes(), MemoryGuard(CPU))


def test_everything_is_recomputed_first() -> None:
    card = Card(capacity=6)
    assert card.step() == undisturbed()
    assert card.failures == 1
    assert card.recompute.recomputed == 2 * 6 and card.stream.num_resident == 6


def test_transposed_weights_are_dropped_before_anything_else(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs.log, "propagate", True)
    card = Card(capacity=12)
    card.guard.transposed.keep()
    with caplog.at_level(logging.WARNING, logger="wanlora"):
        assert card.step() == undisturbed()
    assert card.failures == 1 and all(layer.across is None for layer in card.layers)
    assert card.recompute.recomputed == 0 and card.stream.num_resident == 6
    (message,) = dict.fromkeys(caplog.messages)
    assert "weights are transposed where backward needs them, which frees 0.0 GiB, from now on" in message
    drop(card.model)
    assert card.step() == undisturbed() and card.failures == 1


def test_graphs_that_read_them_are_given_up_before_they_are_dropped() -> None:
    card = Card(capacity=12)
    card.guard.transposed.keep()

    class Graphs:
        is_open = True

        def give_up(self) -> None:
            assert card.guard.transposed.are_kept
            self.is_open = False

    card.guard.spare = graphs = Graphs()
    assert card.step() == undisturbed()
    assert card.failures == 2 and not graphs.is_open and not card.guard.transposed.are_kept


def test_where_that_does_not_suffice_everything_is_recomputed() -> None:
    card = Card(capacity=6)
    card.guard.transposed.keep()
    assert card.step() == undisturbed()
    assert card.failures == 2 and not card.guard.transposed.are_kept
    assert card.recompute.recomputed == 2 * 6 and card.stream.num_resident == 6


@pytest.mark.parametrize(("num_streamed", "everything"), [(0, True), (0, False), (3, False)])
def test_then_more_blocks_are_streamed_until_it_fits(num_streamed: int, everything: bool) -> None:
    card = Card(capacity=1, num_streamed=num_streamed, everything=everything)
    assert card.step() == undisturbed()
    assert card.stream.num_resident <= 1
    assert not set(card.stream.streamed_indexes) & set(card.recompute.optional)
    failures = card.failures
    drop(card.model)
    assert card.step() == undisturbed()
    assert card.failures == failures


def test_blocks_that_stay_on_the_card_for_small_batches_are_given_up_before_more_are_streamed(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs.log, "propagate", True)
    card = Card(capacity=3, num_streamed=4, everything=False, by_size={load_of(BATCH): 0, OTHER: 1})
    with caplog.at_level(logging.WARNING, logger="wanlora"):
        assert card.step([BATCH]) == undisturbed()
    assert card.failures == 1 and card.guard.retried
    assert (card.stream.ring_size, len(card.stream.streamed_indexes)) == (2, 4)
    assert "2 blocks that stayed on the card for batches of this size are swapped from now on" in caplog.text
    drop(card.model)
    assert card.step([BATCH]) == undisturbed() and card.failures == 1 and not card.guard.retried
    card.guard.make_room()
    card.capacity = 0
    drop(card.model)
    assert card.step([BATCH]) == undisturbed()
    assert card.failures == 3 and card.stream.num_resident == 0 and card.stream.ring_size == 2
    assert "as with --blocks_to_swap 4," in caplog.text
    assert card.guard.residency is not None and card.guard.residency.ring_for([OTHER]) == 5


def test_the_ring_follows_the_batches_and_previews_get_the_smallest() -> None:
    card = Card(capacity=6, num_streamed=4, everything=False, by_size={load_of(BATCH): 0, OTHER: 1})
    rings = []
    for batches in ([BATCH], [batch(0, 3)], [BATCH, batch(0, 3)], [BATCH], []):
        drop(card.model)
        assert card.step(batches) == undisturbed()
        rings.append(card.stream.ring_size)
    card.step([BATCH])
    step = step_of(Velocity())
    step.guard = card.guard
    step.make_room()
    assert [*rings, card.stream.ring_size] == [4, 3, 3, 4, 2, 2] and card.failures == 0


def test_memory_that_runs_out_while_buffers_pass_is_had_by_giving_them_back_before(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs.log, "propagate", True)
    card = Card(capacity=99, num_streamed=6, everything=False, by_size={load_of(BATCH): 0, OTHER: 4})
    residency = card.guard.residency
    assert residency is not None
    card.step([BATCH])
    residency.note([OTHER], 2**40)
    card.capacity = 1
    drop(card.model)
    with caplog.at_level(logging.WARNING, logger="wanlora"):
        assert card.step([batch(0, 3)]) == undisturbed()
    assert card.failures == 1 and residency.passing == 0 and card.guard.buffers == 2
    assert "given back before a forward and not within it from now on" in caplog.text


def test_what_a_step_needs_is_noted_and_buffers_that_pass_are_none_of_it() -> None:
    card = Card(capacity=99, num_streamed=6, everything=False, by_size={load_of(BATCH): 0, OTHER: 4})
    card.keeping.meter, card.keeping.limit = FallingMeter(), 2**51
    residency = card.guard.residency
    assert residency is not None
    held = card.keeping.meter.allocated()
    with card.keeping.step(passing=7):
        assert card.keeping._baseline == held - 2**30 - 7
    noted: list[tuple[Sequence[Load], int | None]] = []
    residency.note = lambda loads, need: noted.append((loads, need))  # type: ignore[method-assign]
    card.step([batch(0, 3)])
    assert noted == [([OTHER], card.keeping.need)] and card.keeping.need is not None


def test_what_a_pass_needs_is_measured_from_where_the_ring_has_been_resized() -> None:
    card = Card(capacity=6, num_streamed=4, everything=False, by_size={load_of(BATCH): 0})
    seen = []

    class Meter:
        def allocated(self) -> int:
            seen.append(("allocated", card.stream.ring_size))
            return 0

        def take_highest(self) -> int:
            seen.append(("take_highest", card.stream.ring_size))
            return 0

    card.keeping.meter = Meter()  # type: ignore[assignment]
    card.guard.run(lambda: None, lambda: None, [BATCH])
    card.guard.run(lambda: None, lambda: None, [BATCH])
    assert seen == [("take_highest", 4), ("allocated", 4), ("allocated", 4)]


class FallingMeter:
    """Tensors hold less each time that it is asked."""

    def __init__(self) -> None:
        self.held = 2**50

    def allocated(self) -> int:
        self.held -= 2**30
        return self.held

    def reset(self) -> None:
        pass

    def peak(self) -> int:
        return self.held

    def take_highest(self) -> int:
        return self.held

    def retries(self) -> int:
        return 0

    def free(self) -> int:
        return 2**50


def test_the_last_backward_of_a_step_makes_buffers_for_the_next_and_earlier_ones_none() -> None:
    card = Card(capacity=99, num_streamed=4, everything=False, by_size={load_of(BATCH): 2, OTHER: 0})
    card.keeping.meter, card.keeping.limit = FallingMeter(), 2**51
    rings: list[int] = []
    card.model.register_forward_pre_hook(lambda model, args: rings.append(card.stream.ring_size))
    assert card.step([BATCH, BATCH]) == undisturbed()
    assert rings == [2, 2] and card.stream.ring_size == 4 and card.guard.buffers == 2
    drop(card.model)
    assert card.step([BATCH, BATCH]) == undisturbed()
    assert rings == [2, 2] * 2


def test_an_error_that_nothing_helps_against_passes_through_with_the_figures() -> None:
    card = Card(capacity=-1)
    with pytest.raises(torch.OutOfMemoryError, match=r"2\.00 GiB"):
        card.step()
    assert card.stream.num_resident == 0
    assert card.guard.figures is not None
    assert card.guard.working.names == BATCH.names


def test_the_run_ends_at_once_if_that_is_asked_for() -> None:
    card = Card(capacity=6, retry=False)
    with pytest.raises(torch.OutOfMemoryError):
        card.step()
    assert card.failures == 1 and card.stream.num_resident == 6


def test_blocks_stay_on_the_card_if_the_system_has_no_memory_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "available_host_memory", lambda: 1000)
    card = Card(capacity=1, everything=False)
    with pytest.raises(torch.OutOfMemoryError):
        card.step()
    assert card.stream.num_resident == 6


def test_other_errors_are_not_retried() -> None:
    calls = []

    def passes() -> None:
        calls.append(1)
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        Card(capacity=6).guard.run(passes, lambda: None)
    assert calls == [1]


def test_what_is_done_is_said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs.log, "propagate", True)
    with caplog.at_level(logging.INFO, logger="wanlora"):
        Card(capacity=4).step()
    first, second = dict.fromkeys(caplog.messages)
    assert "did not suffice for 32x16x5 (4 tokens): 6 blocks that kept what they computed are recomputed" in first
    assert "3 blocks more wait in system memory" in second and "--blocks_to_swap 1," in second


def test_sizes_have_names() -> None:
    assert bucket_name(batch(0)) == "32x16x5" and bucket_name(batch(0, 3)) == "32x16x5 x 3"
    made = MemoryGuard(CPU)
    assert describe(made.working) == "the model"
    with made.batch(batch(0, 3)):
        assert describe(made.working) == "32x16x5 x 3 (12 tokens)"


class Exhausted(Velocity):
    """Runs out of memory in the backward pass of its n-th call."""

    fails_at = 1
    calls = 0

    def forward(self, *arguments: Tensor) -> Tensor:  # type: ignore[override]
        out = super().forward(*arguments)  # type: ignore[arg-type]
        self.calls += 1
        if self.calls == self.fails_at:
            out.register_hook(self._run_out)
        return out

    def _run_out(self, grad: Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_gradients_of_the_failed_attempt_are_dropped(fails_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, failing = Velocity(), Exhausted()
    plain.dropout.p = failing.dropout.p = 0.5
    failing.fails_at = fails_at
    expected = measure(step_of(plain), indexed([0, 1, 2]), Position(), 3)
    step = step_of(failing)
    step.guard = MemoryGuard(CPU, retry=True)
    monkeypatch.setattr(step.guard, "_relief", lambda: lambda: None)
    report = measure(step, indexed([0, 1, 2]), Position(), 3)
    assert failing.calls == fails_at + 3
    assert report == expected
    assert plain.mix.grad is not None and failing.mix.grad is not None
    assert torch.equal(failing.mix.grad, plain.mix.grad)
