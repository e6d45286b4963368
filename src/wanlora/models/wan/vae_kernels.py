"""Norm and SiLU of the autoencoder in one pass over memory, on CUDA cards, with Triton.

As separate operations they are five passes over the widest tensors of the model, as long as the convolutions between
them. Before its first use on a device the kernel is held against those operations on small random tensors. Where
Triton is not installed, cannot serve or gives other numbers, callers use the operations.
"""

import functools
from collections.abc import Callable
from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from wanlora.foundation.checked import checked

RowKernel = Callable[[Tensor, Tensor, Tensor], None]
"""Writes what `activate_rows` says of the first two to the third."""

_ELEMENTS = 2048
"""Numbers that one program works on."""
_SHAPES = ((2, 96, 3, 5, 7), (3, 192, 2, 4, 4), (2, 384, 1, 3, 3), (1, 16, 1, 1, 1))
"""Channels that fill no power of two and rows that fill no program, several clips, one frame, one row."""
_ROUNDINGS = 4
"""The kernel may be this many roundings of its number format off, and by `_ABSOLUTE`."""
_ABSOLUTE = 1e-5
_UNTOUCHED = 7.0


def activate_rows(x: Tensor, gamma: Tensor, out: Tensor) -> bool:
    """Write SiLU(x / |x| sqrt(C) gamma), [B, C, F, H, W] with the norm over C, to `out`; False if this cannot be done.

    Both lie with the channels last; `out` may be the later frames of a longer tensor. The maths are in float32.
    """
    if not _serves(x, out):
        return False
    kernel = _checked_kernel(x.device, x.dtype)
    if kernel is None:
        return False
    kernel(x, gamma, out)
    return True


def _serves(x: Tensor, out: Tensor) -> bool:
    """Whether the kernel is made for these tensors."""
    return x.is_cuda and x.is_contiguous(memory_format=torch.channels_last_3d) and _lies_in_rows(out)


def _lies_in_rows(out: Tensor) -> bool:
    """Whether each clip of `out` is one piece of memory with the channels innermost."""
    _, channels, frames, height, width = out.shape
    expected = (1, height * width * channels, width * channels, channels)
    sizes, strides = (channels, frames, height, width), out.stride()[1:]
    return all(size == 1 or stride == wanted for size, stride, wanted in zip(sizes, strides, expected, strict=True))


@functools.cache
def _checked_kernel(device: torch.device, dtype: torch.dtype) -> RowKernel | None:
    """The kernel; None, said once, where Triton is missing, cannot compile it, or makes something else of it."""
    return checked(
        _load_kernel,
        lambda kernel: _disagreement(kernel, device, dtype),
        "the VAE's norms run as separate operations, which costs speed",
    )


def _load_kernel() -> RowKernel:
    """The Triton kernel; importing it raises errors of many kinds."""
    from wanlora.models.wan import vae_triton

    def launch(x: Tensor, gamma: Tensor, out: Tensor) -> None:
        clips, channels, frames, height, width = x.shape
        rows_per_clip = frames * height * width
        padded = 1 << (channels - 1).bit_length()
        rows = max(1, _ELEMENTS // padded)
        with torch.cuda.device(x.device):
            vae_triton.activate[-(-rows_per_clip // rows), clips](
                *(x, gamma, out, rows_per_clip, out.stride(0), sqrt(channels)),
                num_channels=channels,
                padded=padded,
                num_rows=rows,
            )

    return launch


def _disagreement(kernel: RowKernel, device: torch.device, dtype: torch.dtype) -> str | None:
    """What the kernel gets wrong on small random tensors, beyond rounding, with the figure; None if nothing."""
    random = torch.Generator().manual_seed(0)
    for shape in _SHAPES:
        clips, channels, frames, height, width = shape
        x = torch.randn(shape, generator=random).to(device, dtype).contiguous(memory_format=torch.channels_last_3d)
        x[0, :, 0, 0, 0] = 0
        gamma = (torch.rand(channels, 1, 1, 1, generator=random) + 0.5).to(device, dtype)
        longer = torch.full((clips, channels, frames + 3, height, width), _UNTOUCHED, device=device, dtype=dtype)
        longer = longer.contiguous(memory_format=torch.channels_last_3d)
        kernel(x, gamma, longer[:, :, 2:-1])
        expected = torch.full(longer.shape, _UNTOUCHED, device=device)
        expected[:, :, 2:-1] = F.silu(F.normalize(x.float(), dim=1) * (gamma.float() * sqrt(channels)))
        off = (longer.float() - expected).abs()
        allowed = _ROUNDINGS * torch.finfo(dtype).eps * expected.abs() + _ABSOLUTE
        if not bool((off <= allowed).all()):  # so written, a NaN is wrong too
            return f"its kernel is off by {off.max().item():.2g} in {dtype} on {device}"
    return None
