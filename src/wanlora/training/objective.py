"""The loss of one batch: how well the model predicts the velocity from data to noise.

x_t = (1 - t) x0 + t x1 with noise x1 and noise level t; the model is told 1000 t and should answer x1 - x0 (Lipman et
al., 2210.02747). Noise and noise levels of a batch depend on the seed, the epoch and the batch's place in it, and on
nothing else; they are drawn on the CPU, so that every device and every number of processes trains on the same numbers.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wanlora.data.dataset import Batch
from wanlora.diffusion.flow import interpolate, model_timestep, velocity
from wanlora.diffusion.timesteps import TimestepPlan
from wanlora.foundation.random import Streams
from wanlora.foundation.shapes import LatentShape

VelocityModel = Callable[[Tensor, Tensor, Any], Tensor]
"""(x_BCFHW, timestep_B, text) -> velocity_BCFHW, float32; text is a sequence of embeddings or padded ones."""
BatchSizes = Callable[[int], Iterable[int]]
"""epoch -> number of samples of each of its batches, in order."""


@dataclass(frozen=True, slots=True)
class Noising:
    """The random part of one batch, on the CPU, float32."""

    noise_BCFHW: Tensor
    t_B: Tensor


class Noise:
    """Which noise and noise levels each batch of each epoch gets."""

    def __init__(self, streams: Streams, timesteps: TimestepPlan, batch_sizes: BatchSizes) -> None:
        self.streams = streams
        self.timesteps = timesteps
        self.batch_sizes = batch_sizes
        self._epoch: tuple[int, tuple[Tensor, ...]] | None = None

    def __call__(self, x0_BCFHW: Tensor, epoch: int, index: int) -> Noising:
        """The noising of batch `index` of `epoch`."""
        noise = torch.randn(x0_BCFHW.shape, generator=self.streams.generator("noise", epoch, index))
        u_B = self._uniforms(epoch)[index]
        return Noising(noise, self.timesteps.draw(len(u_B), LatentShape(*x0_BCFHW.shape[2:]), u_B=u_B))

    def _uniforms(self, epoch: int) -> tuple[Tensor, ...]:
        """u for every batch of an epoch, drawn at once, so that buckets can spread them over the whole epoch."""
        if self._epoch is None or self._epoch[0] != epoch:
            sizes = list(self.batch_sizes(epoch))
            u = self.timesteps.uniforms(sum(sizes), self.streams.generator("timesteps", epoch))
            self._epoch = (epoch, u.split(sizes))
        return self._epoch[1]


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """All that a pass reads of one batch, on the device."""

    x0_BCFHW: Tensor
    """The data, float32."""
    x1_BCFHW: Tensor
    """The noise, float32."""
    t_B: Tensor
    """The noise levels, float32."""
    text: Sequence[Tensor] | Tensor
    """One embedding T x D per sample, or all of them padded and stacked."""


@dataclass(frozen=True, slots=True)
class Loss:
    """The loss of one batch, with its graph, and the noise levels it was taken at."""

    value: Tensor
    t_B: Tensor


class FlowObjective:
    """Weighted mean squared error of the predicted velocity."""

    def __init__(
        self, model: VelocityModel, noise: Noise, weight: Callable[[Tensor], Tensor], device: torch.device
    ) -> None:
        self.model = model
        self.noise = noise
        self.weight = weight
        self.device = device

    def __call__(self, batch: Batch, epoch: int, index: int) -> Loss:
        """The mean loss over batch `index` of `epoch`, float32."""
        noising = self.noise(batch.latents_BCFHW, epoch, index)
        return Loss(self.losses(batch, noising).mean(), noising.t_B)

    def losses(self, batch: Batch, noising: Noising) -> Tensor:
        """The loss of every sample of a batch [B], float32."""
        return self.losses_of(self.inputs(batch, noising))

    def inputs(self, batch: Batch, noising: Noising) -> Inputs:
        """What a pass reads, copied to the device without waiting for it."""
        return Inputs(
            x0_BCFHW=batch.latents_BCFHW.to(self.device, non_blocking=True).float(),
            x1_BCFHW=self._sent(noising.noise_BCFHW),
            t_B=self._sent(noising.t_B),
            text=[embedding.to(self.device, non_blocking=True) for embedding in batch.text],
        )

    def losses_of(self, inputs: Inputs) -> Tensor:
        """The loss of every sample [B], float32. Nothing here waits for the device or looks at numbers."""
        x0, x1, t_B = inputs.x0_BCFHW, inputs.x1_BCFHW, inputs.t_B
        predicted = self.model(interpolate(x0, x1, t_B), model_timestep(t_B), inputs.text)
        errors_B = (predicted.float() - velocity(x0, x1)).square().flatten(1).mean(1)
        return errors_B * self.weight(t_B)

    def _sent(self, drawn: Tensor) -> Tensor:
        """Numbers drawn on the host, on their way: a copy from memory that is not page-locked waits for the card."""
        if self.device.type == "cuda":
            drawn = drawn.pin_memory()
        return drawn.to(self.device, non_blocking=True)
