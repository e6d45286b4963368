"""The training loop."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from wanlora.data.dataset import Batch
from wanlora.data.order import BatchSpec
from wanlora.foundation.errors import UserError
from wanlora.foundation.log import log
from wanlora.foundation.ranks import Rank
from wanlora.training.after_step import AfterStep
from wanlora.training.checkpoints import Checkpoints
from wanlora.training.forecast import Forecast, Measured, Size
from wanlora.training.guard import bucket_name
from wanlora.training.interrupts import Interrupts
from wanlora.training.metrics import Metrics
from wanlora.training.optimizers import learning_rates
from wanlora.training.pace import Pace
from wanlora.training.position import Position, StepBatches, indexes_left, steps_left
from wanlora.training.previews import Previews
from wanlora.training.step import IndexedBatch, TrainingStep
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
    ) -> None:
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
            ended = self.position.epoch > epoch
            if ended:
                self.metrics.end_epoch(self.position)
            self.validation.when_due(self.position, epoch_ended=ended, ends=self.position.step == self.total_steps)
            if self.checkpoints:
                self.checkpoints.when_due(self.position, epoch_ended=ended)
            self.interrupts.agree()
            self.previews.when_due(self.position, epoch_ended=ended)
            if self.position.step == self.total_steps:
                return
            self.pace.begin()

    def _train_step(self, work: Work) -> None:
        report = self.step.measure(work.share, self.position, work.num_batches)
        with self.interrupts.held():
            self.updating = True
            self.step.update(self.position)
            after = self.after_step()
            self.position = self.position.after(work.num_batches, epoch_length=work.epoch_length)
            self.updating = False
            taken = self.pace.finish(" + ".join(sorted(bucket_name(item.batch) for item in work.share)))
            if report.replayed:
                taken.pop("memory/peak_gib", None)
            self.metrics.record(report, self.position, after | taken | learning_rates(self.step.optimizer))
            self._compare(work, taken)

    def _compare(self, work: Work, taken: Mapping[str, float]) -> None:
        """Hold what was foretold against the step that was just done."""
        stream = self.step.guard.stream
        measured = Measured(
            sizes=[Size(item.batch.pixels, len(item.batch.names)) for item in work.share],
            seconds=taken["seconds"],
            peak=taken.get("memory/peak_gib"),
            kept=self.step.guard.kept,
            streamed=len(stream.streamed_indexes) if stream else 0,
            transposed=self.step.guard.transposed.are_kept,
        )
        for forecast in self.forecasts:
            forecast(measured, self.total_steps - self.position.step)

    def _keep(self) -> None:
        """Save a run that ends early, unless nothing was trained or the weights are those of half a step."""
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
