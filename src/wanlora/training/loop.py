"""The training loop."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from wanlora.data.dataset import Batch
from wanlora.data.order import BatchSpec
from wanlora.foundation.log import log
from wanlora.foundation.ranks import Rank
from wanlora.training.after_step import AfterStep
from wanlora.training.checkpoints import Checkpoints
from wanlora.training.metrics import Metrics
from wanlora.training.optimizers import learning_rates
from wanlora.training.position import Position, StepBatches, indexes_left, steps_left
from wanlora.training.previews import Previews
from wanlora.training.step import IndexedBatch, StepReport, TrainingStep

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
        metrics: Metrics,
        previews: Previews,
        checkpoints: Checkpoints | None,
        position: Position,
        total_steps: int,
    ) -> None:
        self.feed = feed
        self.step = step
        self.after_step = after_step
        self.metrics = metrics
        self.previews = previews
        self.checkpoints = checkpoints
        self.position = position
        self.total_steps = total_steps
        self.working_on = "the model"
        """The size being trained on, for a message if memory runs out."""
        self.working_names: tuple[str, ...] = ()

    def train(self) -> None:
        """Train, save and preview; on Ctrl-C save what is there, then stop."""
        try:
            self.previews.at_first(self.position)
            while self.position.step < self.total_steps:
                self._train_epoch()
        except KeyboardInterrupt:
            self._stop()
            raise
        finally:
            self.metrics.close()
        if self.checkpoints:
            self.checkpoints.at_end(self.position)

    def _train_epoch(self) -> None:
        for work in self.feed.rest_of_epoch(self.position):
            if work.share:
                batch = work.share[-1].batch
                self.working_on, self.working_names = str(batch.pixels), batch.names
            report = self.step(work.share, self.position, work.num_batches)
            epoch = self.position.epoch
            self.position = self.position.after(work.num_batches, epoch_length=work.epoch_length)
            self._note(report)
            ended = self.position.epoch > epoch
            if ended:
                self.metrics.end_epoch(self.position)
            if self.checkpoints:
                self.checkpoints.when_due(self.position, epoch_ended=ended)
            self.previews.when_due(self.position, epoch_ended=ended)
            if self.position.step == self.total_steps:
                return

    def _note(self, report: StepReport) -> None:
        self.metrics.record(report, self.position, self.after_step() | learning_rates(self.step.optimizer))

    def _stop(self) -> None:
        """Keep an interrupted run."""
        if self.checkpoints and self.position.step:
            folder = self.checkpoints.when_stopped(self.position)
            log.info(f"stopped after step {self.position.step}; go on with --resume {folder} (or --resume latest)")
