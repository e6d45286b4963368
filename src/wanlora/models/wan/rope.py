"""Rotary position embedding over time, height and width.

A head's elements form adjacent pairs; each pair is turned by an angle that grows with the token's position on one axis.
Of 64 pairs (head width 128) 22 belong to time, 21 to height, 21 to width. Positions start at 0 on every axis.

Angles are made in float64 and kept as float32 cosines and sines. The official code turns complex128 numbers, which is
slow and cannot be compiled; the tables agree with it to 3e-8. Upstream: Wan2.1 wan/modules/model.py, rope_apply.
"""

import torch
from einops import repeat
from torch import Tensor

from wanlora.foundation.shapes import PATCH, LatentShape

THETA = 10000.0


def axis_widths(head_dim: int) -> tuple[int, int, int]:
    """How many elements of a head encode time, height and width."""
    space = 2 * (head_dim // 6)
    return head_dim - 2 * space, space, space


def rope_table(latent: LatentShape, head_dim: int, device: torch.device) -> Tensor:
    """Cosines and sines of every token, [2, L, head_dim / 2] float32, tokens in (f, h, w) order.

    A cosine and its sine lie side by side in memory, so that both can be read as one complex number.
    """
    f, h, w = latent.frames, latent.height // PATCH, latent.width // PATCH
    time, height, width = (
        _axis_table(length, size).to(device) for length, size in zip((f, h, w), axis_widths(head_dim), strict=True)
    )
    parts = (
        repeat(time, "c f k -> c (f h w) k", h=h, w=w),
        repeat(height, "c h k -> c (f h w) k", f=f, w=w),
        repeat(width, "c w k -> c (f h w) k", f=f, h=h),
    )
    return torch.cat(parts, dim=-1).movedim(0, -1).contiguous().movedim(-1, 0)


def apply_rope(x_BLNK: Tensor, rope_2Lk: Tensor) -> Tensor:
    """Turn each pair of elements by its angle, in float32. `rope_2Lk` is one of `rope_table`.

    A pair is a complex number and a turn a product: one operation, and its gradient another. A compiler knows no
    complex numbers, but makes one operation of a formula. The one here reads each element where it is and beside
    it. A stack of first and second elements would have it compute both for every element and mask one: twice the reads.
    """
    pairs = x_BLNK.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():
        cos_L1k1, sin_L1k1 = rope_2Lk.unsqueeze(-2).unsqueeze(-1)
        signs = 2 * torch.arange(2, device=x_BLNK.device) - 1
        turned = pairs * cos_L1k1 + pairs.flip(-1) * (signs * sin_L1k1)
    else:
        turns_L1k = torch.view_as_complex(rope_2Lk.movedim(0, -1)).unsqueeze(-2)
        turned = torch.view_as_real(torch.view_as_complex(pairs) * turns_L1k)
    return turned.flatten(-2)


class RopeTables:
    """The tables of the latest few latent sizes, so that a bucket does not build its table at every step.

    A table of 32,760 tokens takes 17 MB on the device; no more than `limit` are kept.
    """

    def __init__(self, head_dim: int, limit: int = 8) -> None:
        self.head_dim = head_dim
        self.limit = limit
        self._tables: dict[tuple[LatentShape, torch.device], Tensor] = {}

    def get(self, latent: LatentShape, device: torch.device) -> Tensor:
        """The table for `latent` on `device`, [2, L, head_dim / 2]."""
        key = (latent, device)
        table = self._tables.pop(key, None)
        if table is None:
            table = rope_table(latent, self.head_dim, device)
        self._tables[key] = table
        if len(self._tables) > self.limit:
            del self._tables[next(iter(self._tables))]
        return table


def _axis_table(length: int, size: int) -> Tensor:
    """[2, length, size / 2]: cosines and sines of one axis."""
    frequencies = THETA ** (-torch.arange(0, size, 2, dtype=torch.float64, device="cpu") / size)
    angles = torch.outer(torch.arange(length, dtype=torch.float64, device="cpu"), frequencies)
    return torch.stack((angles.cos(), angles.sin())).float()
