"""A model of one adapted layer, batches of random latents and an engine of one CPU process."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from wanlora.data.dataset import Batch
from wanlora.diffusion.timesteps import build_plan
from wanlora.diffusion.weighting import LOSS_WEIGHTINGS
from wanlora.foundation.random import Streams
from wanlora.foundation.shapes import PixelShape
from wanlora.training.engine import Engine
from wanlora.training.flat import FlatGroups
from wanlora.training.objective import FlowObjective, Noise
from wanlora.training.position import Position
from wanlora.training.rates import PureRates
from wanlora.training.step import IndexedBatch, StepReport, TrainingStep

CPU = torch.device("cpu")
PIXELS = PixelShape(32, 16, 5)
CHANNELS = 3


class Velocity(nn.Module):
    """A velocity that depends on latents, timestep and text through one trained matrix."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.mix = nn.Parameter(torch.randn(CHANNELS, CHANNELS, generator=generator))
        self.dropout = nn.Dropout(0.0)

    def forward(self, x_BCFHW: Tensor, timestep_B: Tensor, text: Sequence[Tensor]) -> Tensor:
        towards = torch.stack([embedding.mean() for embedding in text]) + timestep_B / 1000
        mixed = torch.einsum("dc,bcfhw->bdfhw", self.mix, x_BCFHW)
        return self.dropout(mixed) + towards[:, None, None, None, None]


def engine() -> Engine:
    """One process on the CPU."""
    return Engine(Accelerator(cpu=True, mixed_precision="no"))


def batch(number: int, size: int = 1, *, fill: float | None = None) -> Batch:
    """A batch of its own; `fill` replaces the latents' numbers."""
    generator = torch.Generator().manual_seed(number)
    latents = torch.randn(size, CHANNELS, 2, 2, 4, generator=generator)
    return Batch(
        latents_BCFHW=latents if fill is None else torch.full_like(latents, fill),
        text=[torch.randn(5, 4, generator=generator) for _ in range(size)],
        names=tuple(f"clip{number}_{place}" for place in range(size)),
        pixels=PIXELS,
    )


def indexed(numbers: Sequence[int], **options: Any) -> list[IndexedBatch]:
    """Batches at their places in the epoch."""
    return [IndexedBatch(number, batch(number, **options)) for number in numbers]


def noise(sizes: Sequence[int] = (1,) * 16, *, seed: int = 7, **settings: Any) -> Noise:
    """Noise for an epoch of batches of these sizes."""
    return Noise(Streams(seed), build_plan(**{"timestep_sampling": "uniform", **settings}), lambda epoch: sizes)


def objective(model: nn.Module, made: Noise | None = None, weighting: str = "none") -> FlowObjective:
    """The loss of `model`."""
    return FlowObjective(model, made or noise(), LOSS_WEIGHTINGS.get(weighting), CPU)


def step_of(
    model: nn.Module,
    *,
    max_grad_norm: float = 0.0,
    rate: Callable[[int], float] = lambda step: 1.0,
    scaler: torch.amp.GradScaler | None = None,
    made: Noise | None = None,
    flat: bool = False,
    momentum: float = 0.0,
) -> TrainingStep:
    """Gradient descent at rate 1."""
    groups = [{"params": list(model.parameters()), "lr": 1.0, "name": "unet"}]
    vectors = FlatGroups(groups) if flat else None
    parameters = vectors.vectors if vectors else list(model.parameters())
    optimizer = torch.optim.SGD(vectors.groups if vectors else groups, momentum=momentum)
    return TrainingStep(
        objective=objective(model, made),
        parameters=parameters,
        optimizer=optimizer,
        rates=PureRates(optimizer, rate),
        engine=engine(),
        streams=Streams(7),
        max_grad_norm=max_grad_norm,
        scaler=scaler,
        flat=vectors,
    )


def measure(step: TrainingStep, share: Sequence[IndexedBatch], position: Position, num_batches: int) -> StepReport:
    """A step up to its update."""
    return step.read(step.queue(share, position, num_batches))
