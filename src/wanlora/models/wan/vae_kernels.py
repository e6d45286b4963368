"""Norm and SiLU of the autoencoder in one pass over memory, on CUDA cards, with Triton.

As separate operations they are five passes over the widest tensors of the model, as long as the convolutions between
them. Where Triton is not installed or cannot serve, callers use those operations.
"""

import functools
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from wanlora.foundation.log import say_once

_ELEMENTS = 2048
"""Numbers that one program works on."""


def activate_rows(x: Tensor, gamma: Tensor, out: Tensor) -> bool:
    """Write SiLU(x / |x| sqrt(C) gamma), [B, C, F, H, W] with the norm over C, to `out`; False if this cannot be done.

    Both lie with the channels last; `out` may be the later frames of a longer tensor. The maths are in float32.
    """
    if not (x.is_cuda and x.is_contiguous(memory_format=torch.channels_last_3d) and _lies_in_rows(out)):
        return False
    kernel = _kernel()
    if kernel is None:
        return False
    clips, channels, frames, height, width = x.shape
    rows_per_clip = frames * height * width
    padded = 1 << (channels - 1).bit_length()
    rows = max(1, _ELEMENTS // padded)
    with torch.cuda.device(x.device):
        kernel[-(-rows_per_clip // rows), clips](
            *(x, gamma, out, rows_per_clip, out.stride(0), sqrt(channels)),
            num_channels=channels,
            padded=padded,
            num_rows=rows,
        )
    return True


def _lies_in_rows(out: Tensor) -> bool:
    """Whether each clip of `out` is one piece of memory with the channels innermost."""
    _, channels, frames, height, width = out.shape
    expected = (1, height * width * channels, width * channels, channels)
    sizes, strides = (channels, frames, height, width), out.stride()[1:]
    return all(size == 1 or stride == wanted for size, stride, wanted in zip(sizes, strides, expected, strict=True))


@functools.cache
def _kernel() -> Any:
    """The kernel; None, said once, where Triton is missing or cannot compile it."""
    try:
        from wanlora.models.wan import vae_triton

        row = torch.ones(16, device="cuda")
        vae_triton.activate[(1,)](row, row, torch.empty_like(row), 1, 16, 4.0, num_channels=16, padded=16, num_rows=1)
    except Exception as error:  # Triton is missing, or fails with errors of many kinds: no compiler, an old card
        reason = str(error).partition("\n")[0] or type(error).__name__
        say_once(f"the VAE's norms run as separate operations, which costs speed: Triton cannot be used ({reason})")
        return None
    return vae_triton.activate
