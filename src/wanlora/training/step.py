"""One optimizer step: forward and backward over its batches, reduction, checks, update.

Losses are divided by the number of batches of the whole step over all processes, and gradients are summed over
processes, so accumulation and processes are interchangeable. The host reads the device once per step, and weights that
could be saved are never touched by a number that is none: either the step is read before the update, or the update is
one that takes itself back (`ahead.py`) and the step is read when later ones have been queued. `queue` ends before the
weights change, `update` changes them, `read` tells what the step did. Passes that run out of memory are repeated by a
guard (`guard.py`).
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from wanlora.data.dataset import Batch
from wanlora.foundation.errors import UserError
from wanlora.foundation.log import log, say_once
from wanlora.foundation.random import Streams
from wanlora.memory.measure import is_out_of_memory
from wanlora.training.ahead import READ_AT_ONCE, Reading, TakenBack
from wanlora.training.conditional import scale
from wanlora.training.engine import Engine
from wanlora.training.flat import FlatGroups
from wanlora.training.graphs import Replays
from wanlora.training.guard import MemoryGuard, bucket_name
from wanlora.training.objective import FlowObjective, Inputs
from wanlora.training.optimizers import without_waiting
from wanlora.training.position import Position
from wanlora.training.rates import Rates

Result = TypeVar("Result")


class DivergedError(UserError):
    """Loss or gradient is not a number. Nothing of this step is kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """What one step did."""

    loss: float
    """Mean over the batches of all processes."""
    grad_norm: float
    """Of the adapter's gradient, before clipping."""
    names: tuple[str, ...]
    """The items trained on, of every process."""
    timesteps: tuple[float, ...]
    """The noise level of every item, in the same order."""
    replayed: bool = False
    """Some pass was replayed as a CUDA graph; the allocator is not asked for its memory."""
    skipped: bool = False
    """float16 only: the gradient overflowed at the current loss scale, and the update was left out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QueuedStep:
    """A step whose passes are queued, and may be done or not."""

    position: Position
    """Before the step."""
    numbers: Tensor
    """Loss over all processes and norm of the gradient, on the device."""
    reading: Reading
    """The same, on their way to the host."""
    names: list[str]
    timesteps: list[float]
    replayed: bool
    judge: Callable[[], None]
    """To be called when the step has been read."""


@dataclass(frozen=True, slots=True)
class IndexedBatch:
    """A batch and its place in the epoch."""

    index: int
    batch: Batch


class TrainingStep:
    """Takes optimizer steps."""

    def __init__(
        self,
        *,
        objective: FlowObjective,
        parameters: Sequence[torch.nn.Parameter],
        optimizer: Optimizer,
        rates: Rates,
        engine: Engine,
        streams: Streams,
        max_grad_norm: float,
        scaler: torch.amp.GradScaler | None = None,
        guard: MemoryGuard | None = None,
        flat: FlatGroups | None = None,
        replays: Replays | None = None,
    ) -> None:
        """`parameters` are what the optimizer updates: the vectors of `flat`, if it is given, else the model's.

        `replays` makes one launch of passes where that is faster; it needs `flat` and no `scaler`.
        """
        self.objective = objective
        self.parameters = parameters
        self.optimizer = optimizer
        self.rates = rates
        self.engine = engine
        self.streams = streams
        self.max_grad_norm = max_grad_norm
        self.scaler = scaler
        self.guard = guard or MemoryGuard(engine.device)
        self.flat = flat
        self.replays = replays
        self.taken_back = TakenBack(optimizer, parameters, engine.device)
        self._copies_fit, self._has_updated = True, False
        self._total = torch.zeros((), device=engine.device)
        """The loss of the passes so far, over the batches of the step; it stays where it is."""

    def queue(self, share: Sequence[IndexedBatch], position: Position, num_batches: int) -> QueuedStep:
        """Queue loss and clipped gradient of a step's `num_batches` batches, of which this process has `share`."""
        replayed = self._num_replayed
        passes = partial(self._passes, share, position, num_batches)
        total, names, levels = self.run(passes, [item.batch for item in share])
        if self.replays:
            self.replays.passes_queued()
        if self.flat:
            self.flat.collect()
        self.engine.sum_gradients(self.parameters)
        if self.scaler:
            self.scaler.unscale_(self.optimizer)
        norm = self._clip()
        numbers = torch.stack([self.engine.sum(total), norm.to(total)])
        return QueuedStep(
            position=position,
            numbers=numbers,
            reading=Reading.of(numbers),
            names=names,
            timesteps=levels,
            replayed=self._num_replayed > replayed,
            judge=self.replays.take_watched() if self.replays else lambda: None,
        )

    def run(self, passes: Callable[[], Result], batches: Sequence[Batch]) -> Result:
        """What `passes` over `batches` returns, under the guard, with the factors as they are now."""
        with self.flat.lent() if self.flat else nullcontext():
            return self.guard.run(passes, self.drop_gradients, batches)

    def read(self, queued: QueuedStep) -> StepReport:
        """What a step did; waits for the device.

        Raises `DivergedError`, with the items named, if the loss or its gradient is not finite.
        """
        loss_value, norm_value = queued.reading.get()
        queued.judge()
        report = StepReport(
            loss=loss_value,
            grad_norm=norm_value,
            names=tuple(name for part in self.engine.gather_objects(queued.names) for name in part),
            timesteps=tuple(t for part in self.engine.gather_objects(queued.timesteps) for t in part),
            replayed=queued.replayed,
            skipped=self._overflowed(loss_value, norm_value),
        )
        self._refuse_non_finite(report, queued.position)
        return report

    def _passes(
        self, share: Sequence[IndexedBatch], position: Position, num_batches: int
    ) -> tuple[Tensor, list[str], list[float]]:
        """Forward and backward of `share`: the loss summed up, the items and their noise levels. Repeats exactly."""
        self._total.zero_()
        if self.flat:
            self.flat.begin_step(len(share))
        names: list[str] = []
        levels: list[float] = []
        for item in share:
            noising = self.objective.noise(item.batch.latents_BCFHW, position.epoch, item.index)
            # Dropout repeats on a resumed run and does not depend on how batches are shared out.
            torch.manual_seed(self.streams.seed("dropout", position.epoch, item.index))
            with self.guard.batch(item.batch):
                inputs = self.objective.inputs(item.batch, noising)
                work = partial(self._pass, num_batches)
                if self.replays:
                    self.replays(work, inputs, bucket_name(item.batch), num_batches)
                else:
                    work(inputs)
            names += item.batch.names
            levels += noising.t_B.tolist()
        return self._total, names, levels

    def _pass(self, num_batches: int, inputs: Inputs) -> None:
        """Forward and backward of one batch of `num_batches`. Where passes are replayed it leaves nothing behind."""
        loss = self.objective.losses_of(inputs).mean() / num_batches
        (self.scaler.scale(loss) if self.scaler else loss).backward()
        self._total += loss.detach()
        if self.flat:
            self.flat.end_pass()

    def drop_gradients(self) -> None:
        """Forget what backward has left."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.flat:
            self.flat.drop()

    def make_room(self) -> None:
        """Give back, between steps, memory that only makes steps faster."""
        self.guard.make_room()
        if self.replays:
            self.replays.release()

    def update(self, position: Position) -> None:
        """Apply the gradient that `queue` has left, at the learning rates of this step. For a step that was read."""
        torch.manual_seed(self.streams.seed("optimizer", position.step))  # some optimizers round stochastically
        self.rates.before(position.step)
        if self.scaler:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            with without_waiting(self.optimizer):
                self.optimizer.step()
        self._has_updated = True
        self.drop_gradients()
        if self.replays:
            self.replays.settle()

    def copies(self) -> list[Tensor] | None:
        """What `update_unread` puts back where a step is not sound; None if steps must be read before their updates.

        So it is, too, from the moment on at which memory does not suffice for copies.
        """
        if not self._copies_fit:
            return None
        if self.scaler is not None or not self.taken_back.is_possible:
            if self._has_updated:  # before its first update no optimizer has anything to be copied
                name = type(self.optimizer).__name__
                reason = "float16 changes its loss scale" if self.scaler else f"updates of {name} cannot be taken back"
                say_once(f"{READ_AT_ONCE}: {reason}")
            return None
        try:
            return self.taken_back.copies()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        self._copies_fit = False
        log.warning(
            "the card's memory does not suffice for copies of the LoRA and of what the optimizer remembers: from now "
            f"on {READ_AT_ONCE}"
        )
        return None

    def update_unread(self, queued: QueuedStep, copies: Sequence[Tensor]) -> Callable[[], None]:
        """`update` for a step that was not read: without effect on the device if it, or one before, is not sound.

        `copies` are those of this moment. Returns what has to be called if the step turns out not to be sound, for
        rates and what else lies on the host.
        """
        rates = deepcopy(self.rates.state_dict())
        host_state = self.taken_back.update(partial(self.update, queued.position), queued.numbers, copies)

        def put_back() -> None:
            self.taken_back.put_back(host_state)
            self.rates.load_state_dict(rates)

        return put_back

    @property
    def _num_replayed(self) -> int:
        return self.replays.replayed if self.replays else 0

    def _clip(self) -> Tensor:
        """Limit the gradient's norm, as `torch.nn.utils.clip_grad_norm_` does; returns what it was."""
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.max_grad_norm > 0:
            scale(gradients, (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def _overflowed(self, loss: float, norm: float) -> bool:
        return self.scaler is not None and is_finite(loss) and not is_finite(norm)

    def _refuse_non_finite(self, report: StepReport, position: Position) -> None:
        if report.skipped or (is_finite(report.loss) and is_finite(report.grad_norm)):
            return
        self.drop_gradients()
        what = "loss" if not is_finite(report.loss) else "gradient"
        items = ", ".join(f"{name} (t = {t:.3f})" for name, t in zip(report.names, report.timesteps, strict=True))
        raise DivergedError(
            f"the {what} of step {position.step + 1} is not a finite number; the step was not applied and is not "
            f"saved. It was trained on: {items}. Look at these clips' caches (run wan_cache_latents.py again), lower "
            "--learning_rate, and go on from the last saved state with --resume"
        )


def is_finite(value: float) -> bool:
    """Neither infinite nor not-a-number."""
    return abs(value) < float("inf")
