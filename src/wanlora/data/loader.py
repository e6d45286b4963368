"""Batches read ahead by worker processes, in the order that training asks for.

The order of an epoch travels from the training process to the workers with each request, so workers know nothing of
epochs and seeds and can live through the whole run. A worker that cannot read a file sends the error instead of the
batch, and it is raised where the batch is used, without the worker's traceback around it.
"""

import signal
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from wanlora.data.dataset import Batch, CachedBatches
from wanlora.data.order import BatchSpec
from wanlora.data.plan import DataPlan
from wanlora.foundation.errors import UserError


class SpecSampler(Sampler[BatchSpec]):
    """Gives the batches of the epoch in order."""

    def __init__(self, specs: Sequence[BatchSpec]) -> None:
        self.specs = tuple(specs)

    def __len__(self) -> int:
        return len(self.specs)

    def __iter__(self) -> Iterator[BatchSpec]:
        return iter(self.specs)


class _ErrorsAsValues(Dataset[Batch | UserError]):
    """Lets an error travel from a worker like a batch."""

    def __init__(self, dataset: CachedBatches) -> None:
        self.dataset = dataset

    def __getitem__(self, spec: BatchSpec) -> Batch | UserError:
        try:
            return self.dataset[spec]
        except UserError as error:
            return error


class BatchLoader(DataLoader[Any]):
    """Iterates over the batches of its current list; `use` gives it the next epoch's."""

    def use(self, specs: Sequence[BatchSpec]) -> "BatchLoader":
        """Take `specs` from the next iteration on; persistent workers are kept."""
        sampler = self.sampler
        assert isinstance(sampler, SpecSampler)
        sampler.specs = tuple(specs)
        return self

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        for batch in super().__iter__():
            if isinstance(batch, UserError):
                raise batch
            yield batch


def _leave_ctrl_c_to_training(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal; training decides when it acts, and may want another batch first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def make_loader(
    plan: DataPlan,
    specs: Sequence[BatchSpec] = (),
    *,
    num_workers: int = 0,
    persistent: bool = False,
    pin_memory: bool = False,
    multiprocessing_context: str | None = None,
) -> BatchLoader:
    """A loader of `specs`; `num_workers` 0 reads in this process."""
    return BatchLoader(
        _ErrorsAsValues(CachedBatches.of(plan)),
        batch_size=None,
        sampler=SpecSampler(specs),
        num_workers=num_workers,
        persistent_workers=persistent and num_workers > 0,
        pin_memory=pin_memory,
        multiprocessing_context=multiprocessing_context if num_workers > 0 else None,
        worker_init_fn=_leave_ctrl_c_to_training,
        generator=torch.Generator().manual_seed(0),  # or the loader would draw from the global one
    )
