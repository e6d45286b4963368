"""The training loop.

The host may be a few steps ahead of the card (`ahead.py`): a step is queued, with its update, and read when later ones
have been queued. Whatever looks at the weights, saves them or ends the run comes after all that was queued has been
read.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from wanlora.data.dataset import Batch
from wanlora.data.order import BatchSpec
from wanlora.foundation.errors import UserError
from wanlora.foundation.garbage import set_aside
from wanlora.foundation.log import log
from wanlora.foundation.ranks import Rank
from wanlora.training.after_step import AfterStep
from wanlora.training.checkpoints import Checkpoints
from wanlora.training.forecast import Forecast, Measured, Size
from wanlora.training.guard import bucket_name
from wanlora.training.interrupts import Interrupts
from wanlora.training.metrics import Metrics
from wanlora.training.optimizers import learning_rates
from wanlora.training.pace import Pace, PacedStep
from wanlora.training.position import Position, StepBatches, indexes_left, steps_left
from wanlora.training.previews import Previews
from wanlora.training.step import DivergedError, IndexedBatch, QueuedStep, StepReport, TrainingStep
from wanlora.training.validation import Validation

EpochOrder = Callable[[int], tuple[BatchSpec, ...]]
"""The batches of an epoch, in order."""
Load = Callable[[list[BatchSpec]], Iterable[Batch]]
"""Reads batches ahead of use, in order."""


@dataclass(frozen=True, slots=True)
class Work:
    """One step's share of this process."""

    share: list[IndexedBatch]
    num_batches: int
    epoch_length: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Updated:
    """A step whose update is queued, with all that is told of it."""

    queued: QueuedStep
    report: StepReport | None
    """None if it has not been read."""
    put_back: Callable[[], None] | None
    """To be called if it turns out not to be sound."""
    position: Position
    """After the step."""
    paced: PacedStep
    values: Mapping[str, float]
    measured: Callable[..., Measured]
    """What forecasts are held against, once seconds and peak are known."""


class Feed:
    """Gives a process its batches, step after step, from any position on."""

    def __init__(self, order: EpochOrder, load: Load, rank: Rank, batches_per_step: int) -> None:
        self.order = order
        self.load = load
        self.rank = rank
        self.batches_per_step = batches_per_step

    def rest_of_epoch(self, position: Position) -> Iterator[Work]:
        """The steps from `position` to the end of its epoch."""
        specs = self.order(position.epoch)
        steps = list(steps_left(position, epoch_length=len(specs), batches_per_step=self.batches_per_step))
        indexes = indexes_left(steps, self.rank)
        batches = iter(self.load([specs[index] for index in indexes]))
        for step in steps:
            yield Work(self._share(step, batches), len(step), len(specs))

    def _share(self, step: StepBatches, batches: Iterator[Batch]) -> list[IndexedBatch]:
        return [IndexedBatch(index, next(batches)) for index in step.of(self.rank)]


class Trainer:
    """Runs to the last step from wherever the position stands."""

    def __init__(
        self,
        *,
        feed: Feed,
        step: TrainingStep,
        after_step: AfterStep,
        pace: Pace,
        forecasts: Sequence[Forecast] = (),
        trial: Callable[[], None] | None = None,
        metrics: Metrics,
        validation: Validation,
        previews: Previews,
        checkpoints: Checkpoints | None,
        interrupts: Interrupts,
        position: Position,
        total_steps: int,
        ahead: int = 0,
    ) -> None:
        """Up to `ahead` steps are queued before the oldest is read."""
        self.feed = feed
        self.step = step
        self.after_step = after_step
        self.pace = pace
        self.forecasts = forecasts
        self.trial = trial
        self.metrics = metrics
        self.validation = validation
        self.previews = previews
        self.checkpoints = checkpoints
        self.interrupts = interrupts
        self.position = position
        self.total_steps = total_steps
        self.ahead = ahead
        self._unread: deque[_Updated] = deque()
        self.first_step = position.step
        self.updating = False
        """The weights are being changed: they belong to no position."""

    def train(self) -> None:
        """Train, save and preview. Whatever ends the run early, what has been trained is kept."""
        with self.interrupts:
            try:
                if self.trial is not None:
                    self.trial()
                self.validation.at_first(self.position)
                self.previews.at_first(self.position)
                set_aside()
                while self.position.step < self.total_steps:
                    self._train_epoch()
            except KeyboardInterrupt:
                self._keep()
                self.interrupts.engine.wait()  # a launcher kills all processes when the first one leaves
                raise
            except Exception:
                self._keep()
                raise
            finally:
                self.metrics.close()

    def _train_epoch(self) -> None:
        self.pace.begin()
        for work in self.feed.rest_of_epoch(self.position):
            self.pace.loaded()
            epoch = self.position.epoch
            self._train_step(work)
            ended, ends = self.position.epoch > epoch, self.position.step == self.total_steps
            self._read(leave=0 if ended or ends or self._is_due() else self.ahead)
            if ended:
                self.metrics.end_epoch(self.position)
            self.validation.when_due(self.position, epoch_ended=ended, ends=ends)
            if self.checkpoints:
                self.checkpoints.when_due(self.position, epoch_ended=ended)
            self.interrupts.agree()
            self.previews.when_due(self.position, epoch_ended=ended)
            if ends:
                return
            self.pace.begin()

    def _is_due(self) -> bool:
        """Whether something looks at the weights now, in the middle of an epoch."""
        looks = [self.validation.is_due, self.previews.is_due, *([self.checkpoints.is_due] if self.checkpoints else [])]
        return any(is_due(self.position, epoch_ended=False) for is_due in looks)

    def _train_step(self, work: Work) -> None:
        step, guard = self.step, self.step.guard
        queued = step.queue(work.share, self.position, work.num_batches)
        copies = step.copies() if self.ahead else None
        report = self._read_before_update(queued) if copies is None else None
        with self.interrupts.held():
            self.updating = True
            put_back = None
            if copies is None:
                step.update(self.position)
            else:
                put_back = step.update_unread(queued, copies)
            del copies
            after = self.after_step()
            self.position = self.position.after(work.num_batches, epoch_length=work.epoch_length)
            self.updating = False
            paced = self.pace.finish(" + ".join(sorted(bucket_name(item.batch) for item in work.share)))
            self._unread.append(
                _Updated(
                    queued=queued,
                    report=report,
                    put_back=put_back,
                    position=self.position,
                    paced=paced,
                    values=after | learning_rates(step.optimizer),
                    measured=partial(
                        Measured,
                        sizes=[Size(item.batch.pixels, len(item.batch.names)) for item in work.share],
                        kept=guard.kept,
                        streamed=len(guard.stream.streamed_indexes) if guard.stream else 0,
                        buffers=guard.buffers,
                        retried=guard.retried,
                        transposed=guard.transposed.are_kept,
                    ),
                )
            )
        if paced.compiled:
            set_aside()

    def _read_before_update(self, queued: QueuedStep) -> StepReport:
        """What a step has computed, once all before it are known to be sound."""
        self._read(leave=0)
        return self.step.read(queued)

    def _read(self, *, leave: int) -> None:
        """Read the oldest of the steps that are queued, but for the last `leave`, and tell what they did.

        Raises `DivergedError` for one that was not sound; the run then stands before it.
        """
        while len(self._unread) > leave:
            with self.interrupts.held():
                self._tell(self._unread.popleft())

    def _tell(self, step: _Updated) -> None:
        try:
            report = step.report or self.step.read(step.queued)
        except DivergedError:
            self._unread.clear()
            self.position = step.queued.position
            if step.put_back is not None:
                step.put_back()
            raise
        taken = self.pace.judge(step.paced)
        if report.replayed:
            taken.pop("memory/peak_gib", None)
        self.metrics.record(report, step.position, {**step.values, **taken})
        measured = step.measured(seconds=taken["seconds"], peak=taken.get("memory/peak_gib"))
        for forecast in self.forecasts:
            forecast(measured, self.total_steps - step.position.step)

    def _keep(self) -> None:
        """Save a run that ends early, unless nothing was trained or the weights are those of half a step."""
        with self.interrupts.ignored():
            while self._unread:
                try:
                    self._tell(self._unread.popleft())
                except Exception as error:  # whatever it is, what was trained is worth more than being told of it
                    log.warning(str(error))
        if self.checkpoints is None or self.checkpoints.finished:
            return
        if self.updating or self.position.step == self.first_step:
            return
        try:
            with self.interrupts.ignored():
                folder = self.checkpoints.when_stopped(self.position)
        except (UserError, OSError, RuntimeError) as error:
            log.warning(f"what was trained since the last save is lost, because it cannot be saved: {error}")
        else:
            log.info(f"stopped after step {self.position.step}; go on with --resume {folder} (or --resume latest)")
