"""The batches of an epoch and their order: a pure function of plan, seed and epoch.

Samples of one sub-dataset and one shape share batches. Each repeat is a sample of its own; a bucket's last batch may be
short, nothing is dropped. The usual trainer shuffles on from the state of the epoch before and starts from an unsorted
listing; here any epoch can be made anew, on any machine, so a resumed run sees what an unbroken one would have seen.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from wanlora.data.plan import DataPlan
from wanlora.foundation.random import Streams
from wanlora.foundation.shapes import PixelShape


@dataclass(frozen=True, slots=True)
class BatchSpec:
    """Which samples form a batch."""

    indexes: tuple[int, ...]
    """Positions in `DataPlan.items`."""
    pixels: PixelShape


def epoch_batches(plan: DataPlan, streams: Streams, epoch: int) -> tuple[BatchSpec, ...]:
    """The batches of `epoch` in its order; the stream `order` at position `epoch` shuffles."""
    generator = streams.generator("order", epoch)
    batches = [
        batch for bucket in _buckets(plan) for batch in bucket.batches(_shuffled(list(bucket.indexes), generator))
    ]
    return tuple(batches[index] for index in _shuffled(list(range(len(batches))), generator))


def fixed_batches(plan: DataPlan) -> tuple[BatchSpec, ...]:
    """The same batches as an epoch's, by table, size and name, in an order that never changes."""
    return tuple(batch for bucket in _buckets(plan) for batch in bucket.batches(bucket.indexes))


@dataclass(frozen=True, slots=True)
class _Bucket:
    """Samples that may share batches."""

    indexes: tuple[int, ...]
    """Positions in `DataPlan.items`, each as often as an epoch shows it."""
    pixels: PixelShape
    batch_size: int

    def batches(self, indexes: Sequence[int]) -> Iterator[BatchSpec]:
        """`indexes`, which are the bucket's in any order, in batches."""
        for start in range(0, len(indexes), self.batch_size):
            yield BatchSpec(tuple(indexes[start : start + self.batch_size]), self.pixels)


def _buckets(plan: DataPlan) -> Iterator[_Bucket]:
    offset = 0
    for dataset in plan.datasets:
        buckets: dict[PixelShape, list[int]] = defaultdict(list)
        for position, item in enumerate(dataset.items):
            buckets[item.pixels] += [offset + position] * dataset.repeats
        for pixels, indexes in sorted(buckets.items()):
            yield _Bucket(tuple(indexes), pixels, dataset.config.batch_size)
        offset += len(dataset.items)


def _shuffled(indexes: list[int], generator: torch.Generator) -> list[int]:
    return [indexes[int(position)] for position in torch.randperm(len(indexes), generator=generator)]
