"""One transformer block: self attention, cross attention to the text, feed-forward network.

The residual stream x is added to in float32 and kept in the dtype it arrives in (float32 by default: rounding it to
bfloat16 after each update costs more accuracy than all bfloat16 matmuls together). Matmuls and attention run in the
compute dtype, which is the dtype of the text tokens. Upstream: Wan2.1 wan/modules/model.py, WanAttentionBlock.
"""

import torch
from torch import Tensor, nn

from wanlora.models.attention import attention
from wanlora.models.wan.layers import LayerNorm, Modulation, RMSNorm, project
from wanlora.models.wan.rope import apply_rope
from wanlora.models.wan.spec import WanSizes


class WanAttention(nn.Module):
    """What both attentions have: four projections and norms of queries and keys over the full width."""

    def __init__(self, sizes: WanSizes, dtype: torch.dtype) -> None:
        super().__init__()
        self.q = nn.Linear(sizes.dim, sizes.dim, dtype=dtype)
        self.k = nn.Linear(sizes.dim, sizes.dim, dtype=dtype)
        self.v = nn.Linear(sizes.dim, sizes.dim, dtype=dtype)
        self.o = nn.Linear(sizes.dim, sizes.dim, dtype=dtype)
        self.norm_q = RMSNorm(sizes.dim, sizes.eps)
        self.norm_k = RMSNorm(sizes.dim, sizes.eps)
        self.head_dim = sizes.head_dim
        self.kernel = "sdpa"

    def heads(self, x_BLD: Tensor) -> Tensor:
        """[B, L, N, K]."""
        return x_BLD.unflatten(-1, (-1, self.head_dim))

    def attend(self, q_BLNK: Tensor, k_BTNK: Tensor, v_BTNK: Tensor, alike: int | None = None) -> Tensor:
        """Attention and the output projection, in the dtype of `v_BTNK`; `alike` is `attention`'s."""
        q_BLNK, k_BTNK = q_BLNK.to(v_BTNK.dtype), k_BTNK.to(v_BTNK.dtype)
        out_BLNK = attention(q_BLNK, k_BTNK, v_BTNK, self.kernel, alike=alike)
        out: Tensor = self.o(out_BLNK.flatten(-2))
        return out


class WanSelfAttention(WanAttention):
    """Every video token attends to every other."""

    ONE_INPUT = ("q", "k", "v")
    """Linears that get the same input, and give it one gradient."""

    def forward(self, x_BLD: Tensor, rope_2Lk: Tensor) -> Tensor:
        q, k, v = project(x_BLD, (self.q, self.k, self.v))
        q = apply_rope(self.heads(self.norm_q(q)), rope_2Lk)
        k = apply_rope(self.heads(self.norm_k(k)), rope_2Lk)
        return self.attend(q, k, self.heads(v))


class WanCrossAttention(WanAttention):
    """Video tokens attend to all text rows, padding included: there is no mask.

    A text has `text_len` rows. One with fewer ends with at least two rows of padding, which stand for those left out.
    """

    def __init__(self, sizes: WanSizes, dtype: torch.dtype) -> None:
        super().__init__(sizes, dtype)
        self.text_len = sizes.text_len

    def forward(self, x_BLD: Tensor, text_BTD: Tensor) -> Tensor:
        q = self.norm_q(self.q(x_BLD))
        k, v = project(text_BTD, (self.k, self.v))
        missing = self.text_len - text_BTD.shape[1]
        return self.attend(
            self.heads(q), self.heads(self.norm_k(k)), self.heads(v), alike=missing + 2 if missing else None
        )


class WanBlock(nn.Module):
    """One layer. `norm1` and `norm2` have no parameters; `norm3` is the affine norm before cross attention."""

    def __init__(self, sizes: WanSizes, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm1 = LayerNorm(sizes.dim, sizes.eps, elementwise_affine=False)
        self.self_attn = WanSelfAttention(sizes, dtype)
        self.norm3 = LayerNorm(sizes.dim, sizes.eps)
        self.cross_attn = WanCrossAttention(sizes, dtype)
        self.norm2 = LayerNorm(sizes.dim, sizes.eps, elementwise_affine=False)
        self.ffn = nn.Sequential(
            nn.Linear(sizes.dim, sizes.ffn_dim, dtype=dtype),
            nn.GELU(approximate="tanh"),
            nn.Linear(sizes.ffn_dim, sizes.dim, dtype=dtype),
        )
        self.modulation = nn.Parameter(nn.init.normal_(torch.empty(1, 6, sizes.dim), std=sizes.dim**-0.5))

    def forward(self, x_BLD: Tensor, time_B6D: Tensor, text_BTD: Tensor, rope_2Lk: Tensor) -> Tensor:
        """`time_B6D` is float32; the other dtypes say what the block computes in (see the module's text)."""
        dtype = text_BTD.dtype
        rows = (self.modulation.float() + time_B6D).chunk(6, dim=1)
        attend, feed = Modulation(*rows[:3]), Modulation(*rows[3:])
        out = self.self_attn(attend.modulate(self.norm1(x_BLD)).to(dtype), rope_2Lk)
        x_BLD = _add(x_BLD, out * attend.gate)
        x_BLD = _add(x_BLD, self.cross_attn(self.norm3(x_BLD).to(dtype), text_BTD))
        out = self.ffn(feed.modulate(self.norm2(x_BLD)).to(dtype))
        return _add(x_BLD, out * feed.gate)


def _add(x_BLD: Tensor, update_BLD: Tensor) -> Tensor:
    """Add in float32, keep the dtype of the stream."""
    return (x_BLD.float() + update_BLD).to(x_BLD.dtype)
