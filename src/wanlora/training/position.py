"""Where a run stands, and which batches come next.

An epoch is a list of batches in a fixed order (a function of seed and epoch). One optimizer step consumes the next
`batches_per_step` = accumulation x processes of them; process r of n takes every n-th, from the r-th. The last step of
an epoch takes what is left. So the same batches make up step k however they are shared out, and a run can be continued
from any step, even by another number of processes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from wanlora.foundation.ranks import Rank


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """What has been done."""

    step: int = 0
    """Optimizer steps."""
    epoch: int = 0
    """Whole epochs."""
    batch: int = 0
    """Batches of the current epoch."""

    def after(self, batches: int, *, epoch_length: int) -> "Position":
        """The position one optimizer step of `batches` batches later."""
        done = self.batch + batches
        if done < epoch_length:
            return replace(self, step=self.step + 1, batch=done)
        return Position(step=self.step + 1, epoch=self.epoch + 1)


@dataclass(frozen=True, slots=True)
class StepBatches:
    """The batches of one optimizer step: indexes into the epoch's list."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def of(self, rank: Rank) -> range:
        """The part of process `rank`; it may be empty in the last step of an epoch."""
        return range(self.start + rank.index, self.stop, rank.count)


def steps_left(position: Position, *, epoch_length: int, batches_per_step: int) -> Iterator[StepBatches]:
    """The steps from `position` to the end of its epoch."""
    for start in range(position.batch, epoch_length, batches_per_step):
        yield StepBatches(start, min(start + batches_per_step, epoch_length))


def indexes_left(steps: Sequence[StepBatches], rank: Rank) -> list[int]:
    """Every batch that process `rank` will ask for, in order."""
    return [index for step in steps for index in step.of(rank)]


def steps_per_epoch(epoch_length: int, batches_per_step: int) -> int:
    """Optimizer steps in an epoch."""
    return -(-epoch_length // batches_per_step)


def last_step(epochs: int, position: Position, *, epoch_length: int, batches_per_step: int) -> int:
    """The step that ends epoch number `epochs`, for a run that stands at `position`.

    Counted from there, because the epochs before may have had another length.
    """
    if position.epoch >= epochs:
        return position.step
    whole = (epochs - position.epoch - 1) * steps_per_epoch(epoch_length, batches_per_step)
    return position.step + steps_per_epoch(epoch_length - position.batch, batches_per_step) + whole
