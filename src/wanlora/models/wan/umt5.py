"""The UMT5-XXL encoder, which turns a prompt into the rows that the transformer attends to.

T5 with three peculiarities: attention scores are not divided by the root of the head width, every layer has its own
table of relative position biases, and the feed-forward part is gated. Scores and softmax are float32 inside the
attention kernel whatever the weights are, so bfloat16 loses less here than where scores are rounded first. Float16
overflows and is refused. Source: wan/modules/t5.py of github.com/Wan-Video/Wan2.1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import log
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from wanlora.foundation.blank import without_memory
from wanlora.foundation.errors import CheckpointError, ConfigError
from wanlora.foundation.tensor_files import TensorSource, open_tensors
from wanlora.models.wan.recognise import describe, file_kind
from wanlora.models.wan.row_fp8 import RowFp8Linear, quantise_rows
from wanlora.models.wan.scaled import read_weight
from wanlora.models.wan.umt5_keys import official_name
from wanlora.models.wan.weights import put, require_names, require_shapes

_WHAT = "the UMT5 text encoder"
_MAX_DISTANCE = 128
_EPS = 1e-6
MakeLinear = Callable[[int, int], nn.Module]


@dataclass(frozen=True, kw_only=True, slots=True)
class UMT5Sizes:
    """What differs between encoders of this structure; the defaults are the released one's."""

    vocab: int = 256384
    dim: int = 4096
    attention_dim: int = 4096
    ffn_dim: int = 10240
    num_heads: int = 64
    num_layers: int = 24
    num_buckets: int = 32


class RMSNorm(nn.Module):
    """x over its root mean square, found in float32, times a learned weight."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + _EPS)).to(self.weight.dtype)


class Attention(nn.Module):
    """Self attention with scores q k + bias, not scaled."""

    def __init__(self, sizes: UMT5Sizes, linear: MakeLinear) -> None:
        super().__init__()
        self.num_heads = sizes.num_heads
        self.q = linear(sizes.dim, sizes.attention_dim)
        self.k = linear(sizes.dim, sizes.attention_dim)
        self.v = linear(sizes.dim, sizes.attention_dim)
        self.o = linear(sizes.attention_dim, sizes.dim)

    def forward(self, x_BTD: Tensor, bias_BNTT: Tensor) -> Tensor:
        split = partial(rearrange, pattern="b t (n k) -> b n t k", n=self.num_heads)
        q, k, v = (split(projection(x_BTD)) for projection in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias_BNTT, scale=1.0)
        mixed: Tensor = self.o(rearrange(out, "b n t k -> b t (n k)"))
        return mixed


class FeedForward(nn.Module):
    """fc2(fc1(x) * gelu(gate(x)))."""

    def __init__(self, sizes: UMT5Sizes, linear: MakeLinear) -> None:
        super().__init__()
        self.gate = nn.Sequential(linear(sizes.dim, sizes.ffn_dim), nn.GELU(approximate="tanh"))
        self.fc1 = linear(sizes.dim, sizes.ffn_dim)
        self.fc2 = linear(sizes.ffn_dim, sizes.dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.fc1(x) * self.gate(x))
        return out


class PositionBias(nn.Module):
    """A learned number per head for each bucket of distances."""

    def __init__(self, num_buckets: int, num_heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_buckets, num_heads)

    def forward(self, buckets_TT: Tensor) -> Tensor:
        return rearrange(self.embedding(buckets_TT), "q k n -> 1 n q k")


class Block(nn.Module):
    """Attention and feed-forward part, each on a normalised input and added to it."""

    def __init__(self, sizes: UMT5Sizes, linear: MakeLinear) -> None:
        super().__init__()
        self.norm1 = RMSNorm(sizes.dim)
        self.attn = Attention(sizes, linear)
        self.norm2 = RMSNorm(sizes.dim)
        self.ffn = FeedForward(sizes, linear)
        self.pos_embedding = PositionBias(sizes.num_buckets, sizes.num_heads)

    def forward(self, x_BTD: Tensor, buckets_TT: Tensor, mask_BT: Tensor | None) -> Tensor:
        bias = self.pos_embedding(buckets_TT).to(x_BTD.dtype)
        if mask_BT is not None:
            lowest = torch.finfo(bias.dtype).min
            bias = bias.masked_fill(~rearrange(mask_BT, "b t -> b 1 1 t"), lowest)
        x_BTD = x_BTD + self.attn(self.norm1(x_BTD), bias)
        return x_BTD + self.ffn(self.norm2(x_BTD))


class UMT5Encoder(nn.Module):
    """Token ids to rows of text features. With `fp8` the linear layers hold one byte per weight."""

    def __init__(self, sizes: UMT5Sizes | None = None, *, fp8: bool = False) -> None:
        super().__init__()
        self.sizes = sizes or UMT5Sizes()
        linear = RowFp8Linear if fp8 else partial(nn.Linear, bias=False)
        self.token_embedding = nn.Embedding(self.sizes.vocab, self.sizes.dim)
        self.blocks = nn.ModuleList(Block(self.sizes, linear) for _ in range(self.sizes.num_layers))
        self.norm = RMSNorm(self.sizes.dim)
        self.requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.token_embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The number format of maths and results."""
        return self.token_embedding.weight.dtype

    @torch.no_grad()
    def forward(self, ids_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """Features [B, T, D] of token ids; `mask_BT` is False where a row is padding.

        Rows at padding are meaningless; the others are those that each prompt would have without padding.
        """
        buckets_TT = position_buckets(ids_BT.shape[1], self.sizes.num_buckets).to(ids_BT.device)
        x_BTD = self.token_embedding(ids_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD, buckets_TT, mask_BT)
        features: Tensor = self.norm(x_BTD)
        return features


def position_buckets(length: int, num_buckets: int) -> Tensor:
    """The bucket of each pair (query, key): [length, length].

    Half of the buckets are for keys after the query. Of each half, the first half is for single distances, the rest
    for ranges that grow by a constant factor up to a distance of 128. Found on the CPU, so that borders fall equally
    on every device.
    """
    position = torch.arange(length)
    offset = position[None, :] - position[:, None]
    distance, half = offset.abs(), num_buckets // 2
    exact = half // 2
    growth = torch.log(distance.clamp_min(1).float() / exact) / log(_MAX_DISTANCE / exact)
    ranged = (exact + (growth * (half - exact)).long()).clamp_max(half - 1)
    return torch.where(distance < exact, distance, ranged) + half * (offset > 0)


def load_umt5(
    path: Path, *, device: torch.device | str, dtype: torch.dtype = torch.bfloat16, fp8: bool = False
) -> UMT5Encoder:
    """The encoder stored at `path`, frozen: official, transformers' or ComfyUI's names, fp8 and fp8_scaled included.

    `fp8` stores the linear weights in one byte each; everything else, and the maths, is in `dtype`. Raises
    `CheckpointError` for other files and says what they are.
    """
    if dtype == torch.float16:
        raise ConfigError("the UMT5 text encoder overflows in float16; use bfloat16 or float32")
    with open_tensors(path) as source:
        names = _names(source)
        model = _empty(_sizes(source, names))
        require_names(path, _WHAT, model.state_dict(), names)
        require_shapes(source, _WHAT, model, names)
        with without_memory():
            model = UMT5Encoder(model.sizes, fp8=fp8)
        for name, stored_name in names.items():
            _install(model, name, read_weight(source, stored_name, torch.device(device)), dtype)
    return model.eval()


def _install(model: UMT5Encoder, name: str, weight: Tensor, dtype: torch.dtype) -> None:
    layer = name.removesuffix(".weight")
    if isinstance(model.get_submodule(layer), RowFp8Linear):
        rows, scale = quantise_rows(weight)
        put(model, name, rows)
        put(model, f"{layer}.scale", scale)
    else:
        put(model, name, weight.to(dtype))


def _empty(sizes: UMT5Sizes) -> UMT5Encoder:
    with without_memory():
        return UMT5Encoder(sizes)


def _names(source: TensorSource) -> dict[str, str]:
    """The name in the file for each official name that it holds."""
    kind = file_kind(source.names)
    if kind is None or kind.name != _WHAT:
        raise CheckpointError(
            f"{source.path} {describe(source.names)}; --t5 needs {_WHAT} "
            "(models_t5_umt5-xxl-enc-bf16.pth or umt5_xxl_….safetensors)"
        )
    return {name: stored for stored in source.names if (name := official_name(stored)) is not None}


def _sizes(source: TensorSource, names: dict[str, str]) -> UMT5Sizes:
    """Read off the shapes; a tensor that is needed for this and missing is an error."""
    block = "blocks.0."
    needed = ["token_embedding.weight", *(block + part for part in ("attn.q.weight", "ffn.fc1.weight"))]
    needed.append(block + "pos_embedding.embedding.weight")
    require_names(source.path, _WHAT, needed, set(needed) & names.keys())
    embedding, q, fc1, bias = (source.shape(names[name]) for name in needed)
    num_layers = 1 + max(int(name.split(".")[1]) for name in names if name.startswith("blocks."))
    return UMT5Sizes(
        vocab=embedding[0],
        dim=embedding[1],
        attention_dim=q[0],
        ffn_dim=fc1[0],
        num_heads=bias[1],
        num_layers=num_layers,
        num_buckets=bias[0],
    )
