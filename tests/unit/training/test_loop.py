"""The loop: which batches reach it, and what is kept of a run that ends early."""

import signal
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from itertools import chain, repeat
from typing import Any

import pytest
import torch

from tests.unit.training.parts import PIXELS, Velocity, batch, engine, noise, step_of
from wanlora.data.dataset import Batch
from wanlora.data.order import BatchSpec
from wanlora.foundation.errors import DataError
from wanlora.foundation.log import log
from wanlora.foundation.ranks import Rank
from wanlora.training import loop
from wanlora.training import pace as paces
from wanlora.training.forecast import Measured
from wanlora.training.interrupts import Interrupts
from wanlora.training.loop import Feed, Trainer
from wanlora.training.metrics import Metrics
from wanlora.training.pace import Pace
from wanlora.training.position import Position
from wanlora.training.rates import ForeignRates
from wanlora.training.step import DivergedError, QueuedStep, TrainingStep

LENGTH = 4


@pytest.fixture(params=[0, 2])
def ahead(request: pytest.FixtureRequest) -> int:
    """Steps that are queued before the oldest is read."""
    return int(request.param)


def order(epoch: int) -> tuple[BatchSpec, ...]:
    return tuple(BatchSpec((10 * epoch + index,), PIXELS) for index in range(LENGTH))


def load(specs: list[BatchSpec]) -> Iterable[Batch]:
    return (batch(spec.indexes[0]) for spec in specs)


class Saved:
    """Checkpoints that remember position and weights; with `every` also in the middle of epochs."""

    def __init__(self, step: TrainingStep, total: int, every: int | None = None) -> None:
        self.every = every
        self.on_event: Callable[[], None] = lambda: None
        self.step = step
        self.total = total
        self.finished = False
        self.events: list[tuple[str, Position, torch.Tensor]] = []

    def is_due(self, position: Position, *, epoch_ended: bool) -> bool:
        return bool(self.every and position.step % self.every == 0)

    def when_due(self, position: Position, *, epoch_ended: bool) -> None:
        if position.step == self.total:
            self.finished = True
            self._note("end", position)
        elif self.is_due(position, epoch_ended=epoch_ended):
            self._note("due", position)

    def when_stopped(self, position: Position) -> str:
        self._note("stopped", position)
        return "the folder"

    def _note(self, what: str, position: Position) -> None:
        self.on_event()
        self.events.append((what, position, self.step.parameters[0].detach().clone()))


class NoPreviews:
    """Previews that remember when they were called; `spoil` runs then."""

    def __init__(self, saved: Saved, spoil: Callable[[Position], None]) -> None:
        self.saved = saved
        self.spoil = spoil
        self.seen: list[tuple[int, bool]] = []

    def at_first(self, position: Position) -> None:
        self.seen.append((position.step, False))

    def is_due(self, position: Position, *, epoch_ended: bool) -> bool:
        return False

    def when_due(self, position: Position, *, epoch_ended: bool) -> None:
        self.seen.append((position.step, epoch_ended))
        self.spoil(position)


class NoValidation:
    """Validation that remembers when it was called; `spoil` runs then."""

    def __init__(self, spoil: Callable[[Position], None]) -> None:
        self.spoil = spoil
        self.seen: list[tuple[int, bool, bool]] = []

    def at_first(self, position: Position) -> None:
        self.seen.append((position.step, False, False))

    def is_due(self, position: Position, *, epoch_ended: bool) -> bool:
        return False

    def when_due(self, position: Position, *, epoch_ended: bool, ends: bool) -> None:
        self.seen.append((position.step, epoch_ended, ends))
        self.spoil(position)


class Spoilt(TrainingStep):
    """A step that `before` and `after` an update does something else too."""

    before_queue: Callable[[Position], None] = staticmethod(lambda position: None)
    after_update: Callable[[Position], None] = staticmethod(lambda position: None)

    def queue(self, share: Any, position: Position, num_batches: int) -> QueuedStep:
        self.before_queue(position)
        return super().queue(share, position, num_batches)

    def update(self, position: Position) -> None:
        super().update(position)
        self.after_update(position)


def trainer(
    ahead: int,
    *,
    total: int = 6,
    every: int | None = None,
    position: Position | None = None,
    previews: Callable[[Position], None] = lambda position: None,
    validation: Callable[[Position], None] = lambda position: None,
) -> tuple[Trainer, Spoilt, Saved]:
    step = step_of(Velocity(), made=noise((1,) * LENGTH), momentum=0.5)
    step.rates = ForeignRates(step.optimizer, "ExponentialLR", {"gamma": 0.9})
    step.__class__ = Spoilt
    assert isinstance(step, Spoilt)
    saved = Saved(step, total, every)
    start = position or Position()
    made = Trainer(
        feed=Feed(order, load, Rank(), 1),
        step=step,
        after_step=dict,  # type: ignore[arg-type]
        pace=Pace(),
        metrics=Metrics(
            position=start, total_steps=total, window=LENGTH, tracker=lambda values, step: None, log=None, losses=[]
        ),
        validation=NoValidation(validation),  # type: ignore[arg-type]
        previews=NoPreviews(saved, previews),  # type: ignore[arg-type]
        checkpoints=saved,  # type: ignore[arg-type]
        interrupts=Interrupts(engine()),
        position=start,
        total_steps=total,
        ahead=ahead,
    )
    return made, step, saved


def weights_after(steps: int) -> torch.Tensor:
    """The trained weights of an undisturbed run that reads every step before the next."""
    made, _, saved = trainer(0, total=steps)
    made.train()
    return saved.events[-1][2]


def press_ctrl_c_at(step: int) -> Callable[[Position], None]:
    return lambda position: signal.raise_signal(signal.SIGINT) if position.step == step else None


def fail_at(step: int) -> Callable[[Position], None]:
    def fail(position: Position) -> None:
        if position.step == step:
            raise DataError("a clip is broken")

    return fail


def test_every_batch_of_every_epoch_comes_in_order(ahead: int) -> None:
    made, step, _ = trainer(ahead, total=2 * LENGTH)
    seen: list[str] = []
    step.before_queue = lambda position: seen.append(f"{position.epoch}.{position.batch}")
    made.train()
    assert seen == [f"{epoch}.{index}" for epoch in range(2) for index in range(LENGTH)]
    assert made.position == Position(step=2 * LENGTH, epoch=2)


def test_a_feed_gives_the_same_rest_from_the_middle() -> None:
    feed = Feed(order, load, Rank(), 1)
    whole = [work.share[0] for work in feed.rest_of_epoch(Position(epoch=1))]
    rest = [work.share[0] for work in feed.rest_of_epoch(Position(step=6, epoch=1, batch=2))]
    assert [item.index for item in rest] == [2, 3]
    assert [item.batch.names for item in rest] == [item.batch.names for item in whole[2:]]


def test_the_end_is_saved_before_the_last_previews(ahead: int) -> None:
    made, _, saved = trainer(ahead, previews=fail_at(6))
    with pytest.raises(DataError):
        made.train()
    assert [(what, position.step) for what, position, _ in saved.events] == [("end", 6)]


def test_forecasts_are_told_of_every_step_and_what_is_left(ahead: int) -> None:
    made, step, _ = trainer(ahead, total=4)
    seen: list[tuple[Measured, int]] = []
    made.forecasts = [lambda measured, left: seen.append((measured, left))]
    made.train()
    assert [left for _, left in seen] == [3, 2, 1, 0]
    assert all(len(measured.sizes) == 1 and measured.sizes[0].batch == 1 for measured, _ in seen)
    assert all(measured.seconds > 0 and measured.peak is None for measured, _ in seen)
    assert {(measured.kept, measured.streamed) for measured, _ in seen} == {(step.guard.kept, 0)}


def test_what_a_compiler_has_made_is_set_aside(ahead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, collected = chain([0, 0, 0, 1, 1, 1, 1], repeat(2)), []
    made, _, _ = trainer(ahead)
    monkeypatch.setattr(paces, "compilations", lambda: next(compiled))
    monkeypatch.setattr(loop, "set_aside", lambda: collected.append(made.position.step))
    made.train()
    assert collected == [0, 2, 4]


def test_validation_comes_first_and_is_told_of_every_step(ahead: int) -> None:
    made, _, _ = trainer(ahead)
    made.train()
    assert isinstance(made.validation, NoValidation)
    assert made.validation.seen == [
        *((step, step == LENGTH, False) for step in range(6)),
        (6, False, True),
    ]


def test_a_state_holds_what_was_validated_at_its_step(ahead: int) -> None:
    made, _, saved = trainer(ahead, validation=lambda position: order.append((position.step, list(saved.events))))
    order: list[tuple[int, list[Any]]] = []
    made.train()
    assert order[-1] == (6, []) and saved.events[-1][0] == "end"


@pytest.mark.parametrize("moment", ["queueing", "previews", "validation"])
def test_ctrl_c_keeps_the_steps_that_are_whole(ahead: int, moment: str) -> None:
    spoilt = {moment: press_ctrl_c_at(3)}
    made, step, saved = trainer(
        ahead,
        previews=spoilt.get("previews", lambda position: None),
        validation=spoilt.get("validation", lambda position: None),
    )
    if moment == "queueing":
        step.before_queue = press_ctrl_c_at(3)
    with pytest.raises(KeyboardInterrupt):
        made.train()
    ((what, position, weights),) = saved.events
    assert (what, position) == ("stopped", Position(step=3, batch=3))
    assert torch.equal(weights, weights_after(3))


def test_ctrl_c_in_the_middle_of_an_update_keeps_the_finished_step(ahead: int) -> None:
    made, step, saved = trainer(ahead)
    step.after_update = press_ctrl_c_at(2)  # the third update
    with pytest.raises(KeyboardInterrupt):
        made.train()
    ((what, position, weights),) = saved.events
    assert (what, position) == ("stopped", Position(step=3, batch=3))
    assert torch.equal(weights, weights_after(3))
    assert list(made.metrics.losses)[-1:] and len(made.metrics.losses) == 3


def test_an_error_in_a_step_keeps_the_steps_before_and_passes_on(ahead: int) -> None:
    made, step, saved = trainer(ahead)
    step.before_queue = fail_at(4)
    with pytest.raises(DataError, match="a clip is broken"):
        made.train()
    ((what, position, weights),) = saved.events
    assert (what, position) == ("stopped", Position(step=4, epoch=1))
    assert torch.equal(weights, weights_after(4))


def test_ctrl_c_pressed_again_does_not_lose_what_the_first_one_saves(
    ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, step, saved = trainer(ahead)
    step.before_queue = press_ctrl_c_at(4)
    save = saved.when_stopped

    def pressed_again(position: Position) -> str:
        signal.raise_signal(signal.SIGINT)
        return save(position)

    monkeypatch.setattr(saved, "when_stopped", pressed_again)
    with pytest.raises(KeyboardInterrupt):
        made.train()
    assert [event[0] for event in saved.events] == ["stopped"]


def test_weights_of_half_an_update_are_not_kept(ahead: int) -> None:
    made, step, saved = trainer(ahead)
    step.after_update = fail_at(4)
    with pytest.raises(DataError):
        made.train()
    assert saved.events == []


def test_nothing_is_kept_of_a_run_that_took_no_step(ahead: int) -> None:
    made, step, saved = trainer(ahead, position=Position(step=2, batch=2))
    step.before_queue = fail_at(2)
    with pytest.raises(DataError):
        made.train()
    assert saved.events == []


def test_a_failure_to_keep_does_not_hide_why_the_run_ended(ahead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made, step, saved = trainer(ahead)
    step.before_queue = fail_at(4)

    def full(position: Position) -> str:
        raise OSError("No space left on device")

    monkeypatch.setattr(saved, "when_stopped", full)
    with pytest.raises(DataError, match="a clip is broken"):
        made.train()


def test_steps_are_read_when_later_ones_are_queued() -> None:
    made, step, _ = trainer(2, total=2 * LENGTH)
    read: list[int] = []
    step.before_queue = lambda position: read.append(len(made.metrics.losses))
    made.metrics.losses = deque()
    made.train()
    # The first step is read at once, because it makes what the optimizer remembers; the end of an epoch waits for all.
    assert read == [0, 0, 0, 1, 4, 4, 4, 5]
    assert len(made.metrics.losses) == 8


def test_a_run_ahead_is_the_same_to_the_bit() -> None:
    losses, weights = [], []
    for ahead in (0, 1, 2, 5):
        made, _, saved = trainer(ahead, total=11)
        made.metrics.losses = deque()
        made.train()
        losses.append(list(made.metrics.losses))
        weights.append(saved.events[-1][2])
    assert losses[1:] == losses[:-1] and len(losses[0]) == 11
    assert all(torch.equal(one, weights[0]) for one in weights)


def test_what_is_saved_has_been_read() -> None:
    made, _, saved = trainer(5, total=2 * LENGTH, every=3)
    read: list[int] = []
    made.metrics.losses = deque()
    saved.on_event = lambda: read.append(len(made.metrics.losses))
    made.train()
    assert [position.step for _, position, _ in saved.events] == read == [3, 6, 8]
    for _, position, weights in saved.events:
        assert torch.equal(weights, weights_after(position.step))


@pytest.mark.parametrize("broken", [1, 2, 3, 5])
def test_a_step_that_is_not_finite_leaves_no_trace(ahead: int, broken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_broken(specs: list[BatchSpec]) -> Iterable[Batch]:
        for spec in specs:
            is_broken = spec == order(broken // LENGTH)[broken % LENGTH]
            yield batch(spec.indexes[0], fill=float("inf") if is_broken else None)

    made, step, saved = trainer(ahead, total=11)
    made.feed.load = load_broken
    with pytest.raises(DivergedError, match=f"step {broken + 1} is not a finite number"):
        made.train()
    ((what, position, weights),) = saved.events
    assert (what, position.step) == ("stopped", broken)
    assert torch.equal(weights, weights_after(broken))
    sound, other, _ = trainer(0, total=broken)
    sound.train()
    assert same_state(step.optimizer.state_dict(), other.optimizer.state_dict())
    assert step.rates.state_dict() == other.rates.state_dict()


def same_state(one: Any, other: Any) -> bool:
    """Whether two states of an optimizer hold the same, to the bit; rates are those of the next step in any case."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_state(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same_state, one, other))
    return bool(one == other)


@pytest.mark.parametrize("presses_ctrl_c", [False, True])
def test_steps_that_cannot_be_told_of_are_saved(ahead: int, presses_ctrl_c: bool) -> None:
    def refuse(values: Mapping[str, float], step: int) -> None:
        if presses_ctrl_c:
            signal.raise_signal(signal.SIGINT)
        raise KeyError("told")

    made, step, saved = trainer(ahead)
    step.before_queue = lambda position: setattr(made.metrics, "tracker", refuse) if position.step == 3 else None
    with pytest.raises(KeyError, match="told"):
        made.train()
    ((what, position, weights),) = saved.events
    assert (what, position.step) == ("stopped", 4)
    assert torch.equal(weights, weights_after(4))


def test_a_step_that_is_not_finite_is_found_behind_one_that_cannot_be_told_of() -> None:
    def load_broken(specs: list[BatchSpec]) -> Iterable[Batch]:
        for spec in specs:
            yield batch(spec.indexes[0], fill=float("inf") if spec == order(0)[2] else None)

    def refuse(values: Mapping[str, float], step: int) -> None:
        if step == 2:
            raise KeyError("told")

    made, _, saved = trainer(2)
    made.feed.load, made.metrics.tracker = load_broken, refuse
    with pytest.raises(KeyError, match="told"):
        made.train()
    ((_, position, weights),) = saved.events
    assert position.step == 2 and torch.equal(weights, weights_after(2))


@pytest.mark.parametrize("broken", [None, 2, 3])
def test_without_memory_for_copies_steps_are_read_before_their_updates(
    broken: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(log, "warning", warnings.append)

    def load_broken(specs: list[BatchSpec]) -> Iterable[Batch]:
        for spec in specs:
            is_broken = broken is not None and spec == order(0)[broken]
            yield batch(spec.indexes[0], fill=float("inf") if is_broken else None)

    made, step, saved = trainer(2)
    made.feed.load = load_broken
    copies, asked = step.taken_back.copies, []

    def full() -> list[torch.Tensor]:
        asked.append(made.position.step)
        if made.position.step == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return copies()

    monkeypatch.setattr(step.taken_back, "copies", full)
    with nullcontext() if broken is None else pytest.raises(DivergedError, match=f"step {(broken or 0) + 1} "):
        made.train()
    ((_, position, weights),) = saved.events
    assert position.step == (6 if broken is None else broken)
    assert torch.equal(weights, weights_after(position.step))
    assert asked == [1, 2, 3] and sum("does not suffice for copies" in warning for warning in warnings) == 1
