"""How much arithmetic a training step takes, from sizes alone.

A multiplication and an addition are two operations. Only what grows with width squared or with tokens squared is
counted: the rest (norms, modulation, GELU) costs time on a card, but hardly any arithmetic. The base is frozen, so
backward of a linear layer costs one forward, for the gradient of its input; that of attention costs 2.5 (it computes
its scores again); that of an adapter two. A block that is recomputed costs one forward more; one that has kept the
result of attention that forward without attention and without its last product, which no gradient needs.
"""

from dataclasses import dataclass

from wanlora.foundation.shapes import PATCH
from wanlora.memory.resting import linear_sizes
from wanlora.models.wan.spec import WanSizes

_ATTENTION_BACKWARD = 2.5
_TEXT_LAYERS = ("cross_attn.k", "cross_attn.v")


@dataclass(frozen=True, kw_only=True, slots=True)
class Flops:
    """Operations of one pass or step."""

    linear: float
    """Of matrices that are weights, adapters included."""
    attention: float
    """Of products between tokens."""

    @property
    def total(self) -> float:
        """Both."""
        return self.linear + self.attention


def forward_flops(sizes: WanSizes, tokens: int, batch: int = 1, *, text_rows: int = 512) -> Flops:
    """One forward pass over `batch` samples of `tokens` each, without adapters."""
    outside = tokens * sizes.dim * PATCH**2 * (sizes.in_channels + sizes.out_channels)
    outside += text_rows * sizes.dim * (sizes.text_dim + sizes.dim)
    blocks = sizes.num_layers * (tokens * _on_video(sizes) + text_rows * _on_text(sizes))
    scores = sizes.num_layers * 2 * tokens * (tokens + text_rows) * sizes.dim
    return Flops(linear=2.0 * batch * (outside + blocks), attention=2.0 * batch * scores)


def step_flops(
    sizes: WanSizes,
    tokens: int,
    batch: int = 1,
    *,
    text_rows: int = 512,
    recomputed: int | None = None,
    attention_kept: int = 0,
    trained: int = 0,
) -> Flops:
    """Forward and backward of one batch with `recomputed` blocks computed twice (all of them by default), of which
    `attention_kept` have kept the result of attention.

    `trained` numbers are in the adapters; those that read text are counted as if they read video, which overstates a
    part in a thousand.
    """
    forward = forward_flops(sizes, tokens, batch, text_rows=text_rows)
    again = (sizes.num_layers if recomputed is None else recomputed) / sizes.num_layers
    towards_input = 2.0 * batch * tokens * (sizes.num_layers * _on_video(sizes) + sizes.dim * sizes.out_channels * 4)
    adapters = 2.0 * batch * tokens * trained * (3 + again)
    spared = attention_kept / sizes.num_layers
    last = 2.0 * batch * tokens * sizes.num_layers * sizes.ffn_dim * sizes.dim
    return Flops(
        linear=forward.linear * (1 + again) - spared * last + towards_input + adapters,
        attention=forward.attention * (1 + _ATTENTION_BACKWARD + again - spared),
    )


def _on_video(sizes: WanSizes) -> int:
    """Weights of a block that every video token meets."""
    return sum(out * into for name, (out, into) in linear_sizes(sizes).items() if name not in _TEXT_LAYERS)


def _on_text(sizes: WanSizes) -> int:
    """Weights of a block that every text row meets."""
    return sum(out * into for name, (out, into) in linear_sizes(sizes).items() if name in _TEXT_LAYERS)
