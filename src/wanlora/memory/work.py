"""What a card has to do for one block of a training step, from sizes alone.

Four things take time, and each has its own rate (`cards.py`): products with weights, attention, bytes that kernels
between them read and write, and the beginning and end of every kernel, when most of the card is idle. What a block
keeps decides how much of its forward is computed again in backward (`checkpointing.py`, `saving.py`): nothing, norms
and rotations, all but attention and the last product, or all.

Bytes are counted in passes over the stream at 16 bits. How many there are was fitted, with the rates, to the kernels
of a block on an H100 (benchmarks/results/block-step-14B-*.json: within 5 % at 1,248 to 7,488 tokens in bf16 and fp8
maths) and to the steps of 2026-11-21 with `--no_compile`.
"""

from dataclasses import dataclass
from typing import Literal

from wanlora.memory.footprint import BlockMaths
from wanlora.memory.resting import linear_sizes

Saved = Literal["everything", "products", "attention", "nothing"]
"""What a block keeps from forward to backward."""

_TEXT_LAYERS = ("cross_attn.k", "cross_attn.v")
_ATTENTION_BACKWARD = 2.5
"""Arithmetic of attention's backward, in units of its forward: it computes its scores again."""
_FORWARD, _BACKWARD = 73, 87
"""Passes over the stream of a block: norms, modulation, rotation, activation, sums, rounding; forward and backward."""
_PRODUCTS_AGAIN, _ATTENTION_AGAIN = 31, 58
"""Passes that are made again in the backward of a block that keeps products, and of one that keeps attention besides
those."""
_EAGER_PASSES = 2.8
"""Times as many where each operation is a kernel of its own."""
_KERNELS, _EAGER_KERNELS = 50, 120
"""Kernels of a forward; backward has twice as many."""
_EAGER_WIDENING = 16
"""Bytes a weight between its fp8 and its wide form where each operation is a kernel of its own: two float32 results,
written and read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What there is to do."""

    linear: float = 0.0
    """Operations of products with frozen weights."""
    attention: float = 0.0
    """Operations of products between tokens."""
    moved: float = 0.0
    """Bytes that other kernels read and write."""
    kernels: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            linear=self.linear + other.linear,
            attention=self.attention + other.attention,
            moved=self.moved + other.moved,
            kernels=self.kernels + other.kernels,
        )


def block_work(
    maths: BlockMaths,
    tokens: int,
    batch: int = 1,
    *,
    saved: Saved = "products",
    fp8_products: bool = False,
    transposed: bool = False,
) -> tuple[Work, Work]:
    """Forward and backward of one block over `batch` samples of `tokens` each.

    `fp8_products`: weights are multiplied in fp8, and are there transposed for backward if `transposed`; otherwise fp8
    weights are widened where they are used.
    """
    forward = _forward(maths, tokens, batch, fp8_products=fp8_products)
    backward = Work(
        linear=2.0 * batch * tokens * _weights(maths, on_text=False),
        attention=_ATTENTION_BACKWARD * forward.attention,
        moved=2 * _adapters(maths, tokens, batch) + _stream(maths, tokens, batch, _BACKWARD),
        kernels=2 * forward.kernels,
    )
    if fp8_products:
        backward += Work(moved=0.0 if transposed else 2.0 * _weights(maths))
    else:
        backward += Work(moved=_widening(maths))
    if maths.compiled and saved != "everything":
        backward += Work(moved=_stream(maths, tokens, batch, _PRODUCTS_AGAIN))
    if saved == "nothing":
        backward += forward
    if saved == "attention":
        backward += _without_attention(maths, tokens, batch, forward)
    return forward, backward


def _forward(maths: BlockMaths, tokens: int, batch: int, *, fp8_products: bool) -> Work:
    rows = maths.text_rows
    on_video, on_text = (_weights(maths, on_text=side) for side in (False, True))
    return Work(
        linear=2.0 * batch * (tokens * on_video + rows * on_text),
        attention=4.0 * batch * tokens * (tokens + rows) * maths.sizes.dim,
        moved=_adapters(maths, tokens, batch)
        + _stream(maths, tokens, batch, _FORWARD)
        + (0.0 if fp8_products else _widening(maths)),
        kernels=_KERNELS if maths.compiled else _EAGER_KERNELS,
    )


def _without_attention(maths: BlockMaths, tokens: int, batch: int, forward: Work) -> Work:
    """A forward without attention and its last product, inside of backward."""
    sizes = maths.sizes
    spared = _stream(maths, tokens, batch, _FORWARD - _ATTENTION_AGAIN)
    return Work(
        linear=forward.linear - 2.0 * batch * tokens * sizes.ffn_dim * sizes.dim,
        moved=forward.moved - spared,
        kernels=forward.kernels,
    )


def _weights(maths: BlockMaths, *, on_text: bool | None = None) -> int:
    """Weights of the matrices of a block, or of those that meet video tokens or text rows."""
    named = linear_sizes(maths.sizes).items()
    return sum(out * into for name, (out, into) in named if on_text is None or (name in _TEXT_LAYERS) == on_text)


def _adapters(maths: BlockMaths, tokens: int, batch: int) -> float:
    """Bytes of a forward of the adapters: each reads its layer's input and writes its output; factors are narrow."""
    widths = linear_sizes(maths.sizes)
    rows = sum(sum(widths[name]) for name in maths.adapted if name not in _TEXT_LAYERS)
    return float(batch * tokens * rows * maths.compute.itemsize)


def _stream(maths: BlockMaths, tokens: int, batch: int, passes: float) -> float:
    """Bytes of so many passes over the stream."""
    times = passes if maths.compiled else _EAGER_PASSES * passes
    return times * batch * tokens * maths.sizes.dim * maths.compute.itemsize


def _widening(maths: BlockMaths) -> float:
    """Bytes moved to widen the fp8 weights of a block once."""
    if not maths.fp8:
        return 0.0
    return float(_weights(maths)) * (1 + maths.compute.itemsize + (0 if maths.compiled else _EAGER_WIDENING))
