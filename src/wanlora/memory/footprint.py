"""How much memory a training step needs, foretold from sizes alone.

Three parts. What rests on the card between steps (`resting.py`). What blocks hold from forward to backward: a block
that is recomputed holds its input, a block that is kept holds everything that its backward reads. And the workspace,
which is there once: what the backward of one block computes with.

What a kept block holds is counted, not guessed: the terms below are what autograd (or torch.compile with the wishes of
`saving.py`) was seen to save of `models/wan/blocks.py`, per token; a test counts them anew. Only `_BACKWARD` comes from
a card.

The sum is what tensors hold (torch.cuda.max_memory_allocated). Fragments and the CUDA context come on top.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch

from wanlora.models.wan.spec import WanSizes

ADAPTABLE = (
    *(f"{attention}.{name}" for attention in ("self_attn", "cross_attn") for name in "qkvo"),
    *("ffn.0", "ffn.2"),
)
"""The linear layers of a block by their names in it."""
_TEXT_LAYERS = ("cross_attn.k", "cross_attn.v")
_SHARING = ({"self_attn.q", "self_attn.k", "self_attn.v"}, set(_TEXT_LAYERS))
"""Layers that are given the same input."""

_BACKWARD = (4, 3)
"""Bytes a token that the backward of one block has at its peak beyond what the block holds, in units of its two widths
(stream, feed-forward): the float32 gradient of the stream and one and a half 16-bit matrices of the feed-forward width.
Fitted to benchmarks/results/training-step-14B-h100.json (H100, torch 2.11, compiled and eager, 1248 to 7488 tokens)."""
_LIBRARIES = 80 * 2**20
"""Workspaces of cuBLAS and cuDNN: they are tensors of the allocator, at most one set a stream."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockMaths:
    """How the blocks of a model compute: what decides how much they hold."""

    sizes: WanSizes
    compute: torch.dtype = torch.bfloat16
    """Of matrix products and attention."""
    residual: torch.dtype = torch.float32
    """Of the stream between blocks."""
    compiled: bool = True
    fp8: bool = False
    """Weights are eight bits wide and widened where they are used."""
    rank: int = 0
    """Of the adapters; the largest if they differ."""
    adapted: Collection[str] = ADAPTABLE
    """Layers of a block that have an adapter, names of `ADAPTABLE`."""
    narrow: bool = False
    """The adapters' factors are there in the compute dtype too, made once a step (`lora/narrow.py`)."""
    text_rows: int = 512
    """Rows of text that are computed; cross attention looks at `text_len`, those that stand for many written out."""


def recomputed_block(maths: BlockMaths, tokens: int, batch: int = 1) -> int:
    """Bytes that a block holds from forward to backward if it is recomputed: its input. `tokens` of one sample."""
    return batch * tokens * maths.sizes.dim * maths.residual.itemsize


def kept_block(maths: BlockMaths, tokens: int, batch: int = 1, *, everything: bool = False) -> int:
    """Bytes that a block holds from forward to backward if it is kept, its input included.

    A compiled one holds products, or `everything` (`saving.py`).
    """
    products = maths.compiled and not everything
    rows = tokens * _kept_per_token(maths, products) + _kept_of_text(maths, products)
    return recomputed_block(maths, tokens, batch) + batch * rows + (0 if products else _kept_once(maths))


def attention_per_token(maths: BlockMaths) -> int:
    """Bytes a token of the results of a block's two attentions, with what their backward needs beside them."""
    return 2 * (maths.sizes.dim * maths.compute.itemsize + 4 * maths.sizes.num_heads)


def workspace(maths: BlockMaths, tokens: int, batch: int = 1) -> int:
    """Bytes of one block's backward beyond what rests on the card and what blocks hold, a recomputed one included."""
    sizes = maths.sizes
    narrow, wide = _BACKWARD
    bytes_needed = batch * tokens * (narrow * sizes.dim + wide * sizes.ffn_dim) + _LIBRARIES
    bytes_needed += batch * maths.text_rows * sizes.dim * maths.compute.itemsize
    bytes_needed += 4 * tokens * sizes.head_dim  # the rope table
    if maths.fp8:
        bytes_needed += sizes.dim * sizes.ffn_dim * maths.compute.itemsize  # one widened weight
    return bytes_needed


def step_peak(
    maths: BlockMaths,
    tokens: int,
    batch: int = 1,
    *,
    num_kept: int = 0,
    attention: int = 0,
    everything: bool = False,
    gradients: int = 0,
    summed: int = 0,
) -> int:
    """Bytes that a step needs beyond what rests on the card, with `num_kept` blocks kept and the others recomputed,
    of which `attention` keep the result of attention. `everything`: see `kept_block`.

    The kept blocks are the last ones (`checkpointing.py`): backward has let go of one by the time that another is made
    again, so the first that is kept costs nothing. `gradients` are the bytes of the adapters' gradients that grow while
    what blocks hold is let go, so that only the larger of both counts; `summed` are those of the gradients of earlier
    batches, which are there from the start.
    """
    kept = kept_block(maths, tokens, batch, everything=everything)
    held = recomputed_block(maths, tokens, batch)
    more = batch * tokens * attention_per_token(maths)
    num_recomputed = maths.sizes.num_layers - num_kept
    at_the_turn = num_kept * kept + num_recomputed * held + attention * more
    if not num_kept:
        at_the_turn += kept - held - (more if attention else 0)
    at_the_end = kept if num_recomputed else held
    return max(at_the_turn, at_the_end + gradients) + summed + workspace(maths, tokens, batch)


def _kept_per_token(maths: BlockMaths, products: bool) -> int:
    """Bytes a video token that a kept block holds beyond its input.

    In units of the compute dtype and the width of the stream: queries, keys, values and the result of self attention,
    queries and result of cross attention (6). A block that holds `products` has the two output projections besides, one
    matrix of the feed-forward width, and makes all else again. Others have the inputs of the adapters of q, k and v, of
    the cross query and of the feed-forward network, the feed-forward width twice (before the activation and, for an
    adapter, behind it), and what norms and sums in float32 read.
    """
    dim, wide, item = maths.sizes.dim, maths.sizes.ffn_dim, maths.compute.itemsize
    adapted = set(maths.adapted)
    ranks = maths.rank * len(adapted - set(_TEXT_LAYERS)) * item
    statistics = 4 * (9 + 2 * maths.sizes.num_heads)  # of norms and of both attentions
    if products:
        return item * (8 * dim + wide) + ranks + statistics
    inputs = [{"self_attn.q", "self_attn.k", "self_attn.v"}, {"cross_attn.q"}, {"ffn.0"}]
    narrow = item * (6 + sum(bool(adapted & layers) for layers in inputs)) + _stream_and_norms(maths)
    return dim * narrow + wide * item * (1 + ("ffn.2" in adapted)) + ranks + statistics


def _stream_and_norms(maths: BlockMaths) -> int:
    """Bytes a token and element of the stream that norms, modulation and sums hold, unless they are made again."""
    if maths.compiled:
        # Three queries and keys before their norm and one update in 16 bits; the stream between two updates.
        return 4 * maths.compute.itemsize + maths.residual.itemsize
    # The same queries and keys; the float32 inputs of the three norms, of which a float32 stream is the first.
    return 3 * maths.compute.itemsize + 4 * (2 if maths.residual == torch.float32 else 3)


def _kept_of_text(maths: BlockMaths, products: bool) -> int:
    """Bytes of a text: values of all rows, and keys unless they are made again from those of computed rows before their
    norm; rank activations of these."""
    adapters = len(set(maths.adapted) & set(_TEXT_LAYERS)) * maths.rank
    written_out = (1 if products else 2) * maths.sizes.text_len * maths.sizes.dim
    return maths.compute.itemsize * (written_out + maths.text_rows * (maths.sizes.dim + adapters))


def _kept_once(maths: BlockMaths) -> int:
    """Bytes of both factors of every adapter in the compute dtype: copies of the float32 ones.

    Where they are there in the compute dtype anyway, only the down factors that are joined, because they share an
    input, are copies.
    """
    if maths.narrow or maths.compute == torch.float32:
        joined = [layers for layers in _SHARING if layers <= set(maths.adapted)]
        return maths.compute.itemsize * maths.rank * maths.sizes.dim * sum(map(len, joined))
    widths = dict.fromkeys(ADAPTABLE, 2 * maths.sizes.dim)
    widths |= dict.fromkeys(("ffn.0", "ffn.2"), maths.sizes.dim + maths.sizes.ffn_dim)
    return maths.compute.itemsize * maths.rank * sum(widths[name] for name in maths.adapted)
