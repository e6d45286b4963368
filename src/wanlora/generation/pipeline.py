"""The sampling loop: noise in, latents out, frames at the end.

It borrows the model: train or eval mode of every module is put back, global random generators are not touched, and
nothing of a run stays in memory. The noise is drawn on the CPU in float32, so a seed means the same picture on every
device. Upstream: Wan2.1 wan/text2video.py.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor, nn

from wanlora.diffusion.solvers import SOLVERS
from wanlora.foundation.errors import UserError
from wanlora.foundation.shapes import LatentShape

Frames = NDArray[np.uint8]
"""Frames, height, width, red green blue."""
_FRAMES_AT_ONCE = 8
Progress = Callable[[int, int], None]
"""Called after each step with the steps done and their total."""


class VelocityModel(Protocol):
    """What the loop needs of a model."""

    def __call__(self, x_BCFHW: Tensor, timestep_B: Tensor, text: list[Tensor]) -> Tensor:
        """The velocity [B, C, F, H, W]; `timestep_B` on the 0..1000 scale, `text` one [T, D] per sample."""


class LatentDecoder(Protocol):
    """What turns latents into pixels."""

    def decode(self, latents_BCFHW: Tensor) -> Tensor:
        """Pixels [B, 3, frames, height, width] in [-1, 1]."""


@torch.no_grad()  # not inference mode: tables that a model builds and keeps here must serve training as well
def sample_latents(
    model: VelocityModel,
    text: Tensor,
    negative_text: Tensor | None,
    *,
    latent: LatentShape,
    steps: int,
    shift: float,
    guidance: float,
    seed: int,
    device: torch.device | str,
    solver: str = "unipc",
    channels: int = 16,
    progress: Progress | None = None,
) -> Tensor:
    """Normalised latents [C, F, H, W], float32 on `device`, of one picture or clip.

    `text` and `negative_text` are embeddings [T, D]. With guidance g the velocity is v_n + g (v_t - v_n), two forward
    passes a step; with g = 1 or without a negative text there is one pass. Raises `UserError` naming the step at which
    values stopped being finite, `ConfigError` for an unknown solver or senseless settings.
    """
    walk = SOLVERS.get(solver)(steps, shift)
    x = initial_noise(latent, seed, channels).to(device)
    text = text.to(device)
    negative = None if negative_text is None or guidance == 1.0 else negative_text.to(device)
    with evaluating(model):
        for index, timestep in enumerate(walk.timesteps):
            velocity = _guided(model, x, timestep, text, negative, guidance)
            x = walk.step(velocity, x, index)
            _require_finite(x, f"step {index + 1} of {steps} (timestep {timestep}, seed {seed})")
            if progress is not None:
                progress(index + 1, steps)
    return rearrange(x, "1 c f h w -> c f h w")


@torch.no_grad()
def decode_frames(vae: LatentDecoder, latents_CFHW: Tensor) -> Frames:
    """Frames [F, H, W, 3] uint8 of normalised latents. Raises `UserError` if the VAE's pixels are not finite."""
    pixels_BCFHW = vae.decode(rearrange(latents_CFHW, "c f h w -> 1 c f h w"))
    return np.concatenate([_levels(part) for part in pixels_BCFHW.split(_FRAMES_AT_ONCE, dim=2)])


def _levels(pixels_BCFHW: Tensor) -> Frames:
    """Some frames [1, 3, F, H, W] in [-1, 1] as bytes; not all at once, which takes as much as decoding in tiles."""
    _require_finite(pixels_BCFHW, "decoding by the VAE")
    levels_BCFHW = pixels_BCFHW.float().add(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)
    return rearrange(levels_BCFHW, "1 c f h w -> f h w c").cpu().contiguous().numpy()


def initial_noise(latent: LatentShape, seed: int, channels: int = 16) -> Tensor:
    """Standard normal [1, C, F, H, W], float32 on the CPU: a pure function of size and seed."""
    shape = (1, channels, latent.frames, latent.height, latent.width)
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float32)


@contextmanager
def evaluating(model: object) -> Iterator[None]:
    """Eval mode while the block runs; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()] if isinstance(model, nn.Module) else []
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _guided(
    model: VelocityModel, x: Tensor, timestep: int, text: Tensor, negative: Tensor | None, guidance: float
) -> Tensor:
    """The velocity at a step, float32, away from the negative text by `guidance`."""
    timestep_B = torch.full((len(x),), float(timestep), device=x.device)
    towards = model(x, timestep_B, [text]).float()
    if negative is None:
        return towards
    away = model(x, timestep_B, [negative]).float()
    return away + guidance * (towards - away)


def _require_finite(values: Tensor, where: str) -> None:
    if not values.isfinite().all():
        raise UserError(
            f"sampling broke down: NaN or infinite values at {where}. If the adapter has been trained too hot, go back "
            f"to an earlier checkpoint and lower --learning_rate; if the maths runs in fp16, use bf16"
        )
