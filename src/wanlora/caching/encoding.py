"""From pixels to latents, in batches."""

from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from wanlora.data.resize import Clip
from wanlora.foundation.errors import MemoryPlanError
from wanlora.models.wan.vae import WanVAE


class LatentEncoder:
    """A VAE and how its latents are stored."""

    def __init__(self, vae: WanVAE, *, storage: torch.dtype, cudnn: bool = True) -> None:
        self._vae = vae
        self._storage = storage
        self._cudnn = cudnn

    @property
    def maths(self) -> torch.dtype:
        """What the VAE computes in."""
        return self._vae.dtype

    def encode(self, clips: Sequence[Clip]) -> list[Tensor]:
        """Normalised latents [C, F, H, W] on the CPU, in the storage format, of clips of one shape.

        Raises `MemoryPlanError` if the device's memory does not suffice.
        """
        try:
            with nullcontext() if self._cudnn else torch.backends.cudnn.flags(enabled=False):
                latents_BCFHW = self._vae.encode(to_pixels(clips))
        except torch.OutOfMemoryError as error:
            frames, height, width = clips[0].shape[:3]
            raise MemoryPlanError(
                f"the VAE ran out of memory on {len(clips)} x {width}x{height}x{frames}; everything before is "
                "written. Run again with --batch_size 1, --vae_cache_cpu or --vae_dtype bfloat16, or close programs "
                "that use the GPU"
            ) from error
        return list(latents_BCFHW.to("cpu", self._storage).unbind())


def to_pixels(clips: Sequence[Clip]) -> Tensor:
    """Clips of bytes (frames, height, width, RGB) as float32 pixels [B, 3, frames, height, width] in [-1, 1]."""
    pixels_BCFHW = rearrange(torch.from_numpy(np.stack(clips)), "b f h w c -> b c f h w")
    return pixels_BCFHW.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1)
