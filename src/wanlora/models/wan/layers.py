"""Small layers of the transformer, each with its precision decided here and not by autocast.

Two kinds of weights. Matrices of the blocks, the patch and the text embedding are in the model's compute dtype and get
activations in that dtype. Everything that the official code keeps out of autocast (the timestep path, norms,
modulation, the head) computes in float32 and declares float32 parameters: the "float32 islands".
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from wanlora.foundation.shapes import PATCH, LatentShape

_ROWS = 32
"""Texts are computed with a multiple of so many rows."""
_WIDENED = 20 * 2**20
"""Bytes of a weight that are widened at a time: they stay in the cache of a card, and need no memory for the whole."""


def project(x: Tensor, linears: Sequence[Callable[[Tensor], Tensor]]) -> tuple[Tensor, ...]:
    """Apply several linears to one input: the one place where projections share what they need of it.

    A class of linears that can share has a static method `together(x, linears)` which returns all outputs.
    """
    kind: Any = type(linears[0])
    if len(linears) > 1 and hasattr(kind, "together") and all(type(linear) is kind for linear in linears):
        outs: tuple[Tensor, ...] = kind.together(x, linears)
        return outs
    return tuple(linear(x) for linear in linears)


def sinusoid(timestep_B: Tensor, size: int) -> Tensor:
    """Encode timesteps (0..1000) as [cosines, sines], [B, size] float32, computed in float64."""
    half = size // 2
    steps = torch.arange(half, dtype=torch.float64, device=timestep_B.device)
    angles = torch.outer(timestep_B.double(), torch.exp(steps * (-math.log(10000.0) / half)))
    return torch.cat((angles.cos(), angles.sin()), dim=-1).float()


class Modulation(NamedTuple):
    """How a timestep acts on one sublayer: its input is scaled and shifted, its output gated. Each [B, 1, D]."""

    shift: Tensor
    scale: Tensor
    gate: Tensor

    def modulate(self, x_BLD: Tensor) -> Tensor:
        """Scale and shift a normalised input."""
        return x_BLD * (1 + self.scale) + self.shift


class LayerNorm(nn.LayerNorm):
    """Layer norm in float32; the result is float32."""

    def forward(self, input: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(input.float(), self.normalized_shape, weight, bias, self.eps)


class RMSNorm(nn.Module):
    """Root mean square norm over the full width; the result is float32.

    As in the official code the normalised input is rounded to its own dtype before the float32 weight multiplies it.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x_BLD: Tensor) -> Tensor:
        return F.rms_norm(x_BLD, x_BLD.shape[-1:], eps=self.eps) * self.weight.float()


class Float32Linear(nn.Linear):
    """A linear that computes in float32, whatever its weight is stored in.

    A large weight is widened some rows at a time: the time projection of the 14B model takes 630 MB in float32, and is
    multiplied by one row for each sample.
    """

    def forward(self, input: Tensor) -> Tensor:
        x, bias = input.float(), self.bias.float()
        rows = _WIDENED // (4 * self.in_features)
        if self.weight.dtype == torch.float32 or self.weight.requires_grad or self.out_features <= rows:
            return F.linear(x, self.weight.float(), bias)
        pieces = zip(self.weight.split(rows), bias.split(rows), strict=True)
        return torch.cat([F.linear(x, weight.float(), part) for weight, part in pieces], dim=-1)


class PatchEmbedding(nn.Conv3d):
    """Turns each 1 x 2 x 2 patch of latents into a token.

    The parameters are those of a convolution whose stride is its kernel; that is a linear on patch vectors, which is
    faster and the same to the last bit.
    """

    def __init__(self, in_channels: int, dim: int, dtype: torch.dtype) -> None:
        super().__init__(in_channels, dim, (1, PATCH, PATCH), stride=(1, PATCH, PATCH), dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        patches = rearrange(input, "b c f (h p) (w q) -> b (f h w) (c p q)", p=PATCH, q=PATCH)
        return F.linear(patches, self.weight.flatten(1), self.bias)


class Head(nn.Module):
    """The last norm and linear: tokens to patches of velocity, all in float32."""

    def __init__(self, dim: int, out_channels: int, eps: float) -> None:
        super().__init__()
        self.norm = LayerNorm(dim, eps, elementwise_affine=False)
        self.head = Float32Linear(dim, out_channels * PATCH**2)
        self.modulation = nn.Parameter(nn.init.normal_(torch.empty(1, 2, dim), std=dim**-0.5))

    def forward(self, x_BLD: Tensor, time_BD: Tensor) -> Tensor:
        """`time_BD` is the time embedding itself, not its projection."""
        shift, scale = (self.modulation.float() + time_BD.unsqueeze(1)).chunk(2, dim=1)
        out: Tensor = self.head(self.norm(x_BLD) * (1 + scale) + shift)
        return out


def unpatchify(x_BLP: Tensor, latent: LatentShape) -> Tensor:
    """Lay tokens out as latents, [B, C, F, H, W]. Channels are fastest here, slowest in the patch embedding."""
    return rearrange(
        x_BLP,
        "b (f h w) (p q c) -> b c f (h p) (w q)",
        f=latent.frames,
        h=latent.height // PATCH,
        w=latent.width // PATCH,
        p=PATCH,
        q=PATCH,
    )


def text_rows(longest: int, limit: int) -> int:
    """How many rows to compute for texts of at most `longest` tokens that count as `limit` rows.

    The rest is padding, all rows of it alike: two of them are enough to stand for it (`WanCrossAttention`). Rounded up,
    so that few different sizes occur.
    """
    rows = -(-(longest + 2) // _ROWS) * _ROWS
    return rows if rows < limit else limit


def pad_texts(texts: Sequence[Tensor], rows: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Stack texts [T_i, text_dim] as [B, rows, text_dim], zeros below each."""
    longest = max(len(text) for text in texts)
    if longest > rows:
        raise ValueError(f"a text embedding has {longest} rows, the transformer takes at most {rows}")
    return torch.stack([F.pad(text.to(device, dtype), (0, 0, 0, rows - len(text))) for text in texts])
