"""From pixels to latents, in batches, with the card working ahead of whoever writes them."""

from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from wanlora.data.resize import Clip
from wanlora.foundation.errors import MemoryPlanError
from wanlora.memory.fitting import FittedVAE, TilingChoice
from wanlora.memory.measure import is_out_of_memory
from wanlora.models.wan.vae import WanVAE


class Encoded:
    """Latents of a batch, perhaps still being computed."""

    def __init__(self, latents_BCFHW: Tensor) -> None:
        self._latents = torch.empty(
            latents_BCFHW.shape, dtype=latents_BCFHW.dtype, pin_memory=latents_BCFHW.is_cuda
        ).copy_(latents_BCFHW, non_blocking=True)
        self._ready = torch.cuda.current_stream(latents_BCFHW.device).record_event() if latents_BCFHW.is_cuda else None

    def latents(self) -> list[Tensor]:
        """Normalised latents [C, F, H, W] of each clip, on the CPU, once they are there."""
        if self._ready is not None:
            self._ready.synchronize()
        return list(self._latents.unbind())


class LatentEncoder:
    """A VAE, how it is fitted to the device's memory and how its latents are stored."""

    def __init__(self, vae: WanVAE, *, storage: torch.dtype, cudnn: bool = True, tiling: TilingChoice = "auto") -> None:
        self._vae = vae
        self._fitted = FittedVAE(vae, tiling=tiling)
        self._tiling = tiling
        self._storage = storage
        self._cudnn = cudnn

    @property
    def maths(self) -> torch.dtype:
        """What the VAE computes in."""
        return self._vae.dtype

    def encode(self, clips: Sequence[Clip]) -> Encoded:
        """Latents in the storage format of clips of one shape; a card computes on when this has returned.

        Raises `MemoryPlanError` if the device's memory does not suffice.
        """
        try:
            with nullcontext() if self._cudnn else torch.backends.cudnn.flags(enabled=False):
                latents_BCFHW = self._fitted.encode(to_pixels(clips, pin=self._vae.device.type == "cuda"))
                return Encoded(latents_BCFHW.to(self._storage))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            frames, height, width = clips[0].shape[:3]
            whole = "without --vae_tiling off, or with --batch_size 1," if self._tiling == "off" else "with"
            raise MemoryPlanError(
                f"the VAE ran out of memory on {len(clips)} x {width}x{height}x{frames}; everything before is "
                f"written. Run again {whole} --vae_cache_cpu or --vae_dtype bfloat16, or close programs that use the "
                "GPU"
            ) from error


def to_pixels(clips: Sequence[Clip], *, pin: bool = False) -> Tensor:
    """Clips (frames, height, width, RGB) as bytes [B, 3, frames, height, width]; page-locked if `pin`."""
    pixels = torch.empty((len(clips), *clips[0].shape), dtype=torch.uint8, pin_memory=pin)
    np.stack(clips, out=pixels.numpy())
    return rearrange(pixels, "b f h w c -> b c f h w")
