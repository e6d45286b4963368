"""The most expensive batch, tried before the first step.

Memory that does not suffice shows in the first minute and not when the largest clip happens to be drawn. The gradients
are thrown away, the random generators are put back and nothing is logged: the run is the same, to the bit, as without
the trial. What the optimizer will remember is not there before the first step, so its place is taken meanwhile.
"""

import time

import torch

from wanlora.data.dataset import Batch, CachedBatches
from wanlora.data.order import BatchSpec, fixed_batches
from wanlora.data.plan import DataPlan
from wanlora.foundation.log import log
from wanlora.foundation.shapes import LatentShape
from wanlora.memory.measure import memory_figures
from wanlora.training.guard import describe
from wanlora.training.objective import Noising
from wanlora.training.step import TrainingStep

_LEVEL = 0.5


def largest_batch(plan: DataPlan) -> BatchSpec:
    """The batch of an epoch with the most tokens."""
    return max(fixed_batches(plan), key=lambda batch: len(batch.indexes) * LatentShape.of(batch.pixels).num_tokens)


class Trial:
    """Call it before the first step."""

    def __init__(self, plan: DataPlan, step: TrainingStep, *, state_bytes: float) -> None:
        """The optimizer will remember `state_bytes` of each trained number."""
        self.plan = plan
        self.step = step
        self.state_bytes = state_bytes

    @property
    def missing_memory(self) -> int:
        """Bytes that the optimizer takes at its first step; 0 once it has taken it."""
        if self.step.optimizer.state:
            return 0
        return int(self.state_bytes * sum(parameter.numel() for parameter in self.step.parameters))

    def __call__(self) -> None:
        """Forward and backward of the largest batch. Memory that runs out is treated as in any step."""
        began = time.perf_counter()
        device, guard = self.step.engine.device, self.step.guard
        batch = CachedBatches.of(self.plan)[largest_batch(self.plan)]
        place = torch.empty(self.missing_memory, dtype=torch.uint8, device=device)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            self.step.run(lambda: self._pass(batch), [batch])
        self.step.drop_gradients()
        del place
        figures = memory_figures(device)
        peak = f", peak {figures.peak:.1f} of {figures.total:.1f} GiB" if figures.total else ""
        log.info(
            f"trial of the largest batch, {describe(guard.working)}: its memory suffices{peak}; "
            f"{time.perf_counter() - began:.1f} s"
        )

    def _pass(self, batch: Batch) -> None:
        latents = batch.latents_BCFHW
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
        with self.step.guard.batch(batch):
            losses_B = self.step.objective.losses(batch, Noising(noise, torch.full((len(latents),), _LEVEL)))
            losses_B.mean().backward()
