"""What rests on the card between two training steps: the frozen weights, the adapters, what the optimizer remembers.

Counted from sizes and number formats as the loader leaves them: matrices of the blocks in fp8 with their scales or in
the compute dtype, norms, modulation and the small float32 layers as `models/wan/layers.py` declares them.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from wanlora.foundation.shapes import PATCH
from wanlora.memory.footprint import ADAPTABLE
from wanlora.models.wan.spec import WanSizes

_SCALED_BLOCK = 64
"""Inputs that share an fp8 scale (`quantization/blockwise.py`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightFormats:
    """Number formats of the frozen weights."""

    compute: torch.dtype
    """Of everything that is not quantised."""
    fp8: bool = False
    """Matrices of the blocks are in eight bits."""
    scales: Literal["scaled", "rows", "plain"] = "scaled"
    """Of these: one per 64 inputs, one per output, or one in all."""
    islands: torch.dtype = torch.bfloat16
    """Of the matrices of the float32 layers: the file's format if that has 16 bits, otherwise float32."""


def linear_sizes(sizes: WanSizes) -> dict[str, tuple[int, int]]:
    """(out, in) of every linear layer of a block, by its name in the block."""
    square = (sizes.dim, sizes.dim)
    return dict.fromkeys(ADAPTABLE, square) | {
        "ffn.0": (sizes.ffn_dim, sizes.dim),
        "ffn.2": (sizes.dim, sizes.ffn_dim),
    }


def block_weights(sizes: WanSizes, formats: WeightFormats) -> int:
    """Bytes of one block's frozen weights."""
    linears = linear_sizes(sizes).values()
    matrices = sum(_matrix(size, formats) for size in linears)
    biases = formats.compute.itemsize * sum(out for out, _ in linears)
    norms_and_modulation = 4 * sizes.dim * (4 + 2 + 6)
    return matrices + biases + norms_and_modulation


def outer_weights(sizes: WanSizes, formats: WeightFormats) -> int:
    """Bytes of the frozen weights outside of the blocks: embeddings, timestep path, head."""
    dim, island = sizes.dim, min(formats.islands.itemsize, 4)
    embeddings = dim * (sizes.in_channels * PATCH**2 + 1) + dim * (sizes.text_dim + dim + 2)
    head = sizes.out_channels * PATCH**2
    matrices = dim * (sizes.freq_dim + dim + 6 * dim + head)
    return embeddings * formats.compute.itemsize + matrices * island + 4 * (8 * dim + head + 2 * dim)


def transposed_weights(sizes: WanSizes) -> int:
    """Bytes of one block's fp8 matrices a second time, transposed."""
    return sum(out * into for out, into in linear_sizes(sizes).values())


def _matrix(size: tuple[int, int], formats: WeightFormats) -> int:
    out, into = size
    if not formats.fp8:
        return out * into * formats.compute.itemsize
    if formats.scales == "plain":
        return out * into + 4
    by_block = formats.scales == "scaled" and into % _SCALED_BLOCK == 0
    return out * into + 4 * out * (into // _SCALED_BLOCK if by_block else 1)
