"""The Wan video transformer: noised latents, timestep and text in, velocity out.

Attribute names are those of the official checkpoints, so that loading needs no map. There is no autocast: which part
computes in which dtype is written where it happens (`layers.py`). Nothing in the forward pass waits for the device.

Every block is called through `run_block`, which others replace to recompute, stream or time blocks.
Upstream: Wan2.1 wan/modules/model.py, WanModel.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from wanlora.foundation.shapes import LatentShape
from wanlora.models.attention import require_kernel
from wanlora.models.wan.blocks import WanBlock
from wanlora.models.wan.layers import Float32Linear, Head, PatchEmbedding, pad_texts, sinusoid, text_rows, unpatchify
from wanlora.models.wan.rope import RopeTables
from wanlora.models.wan.spec import WanSizes


def run_directly(block: nn.Module, *args: Tensor) -> Tensor:
    """Call the block: what `run_block` does unless someone replaces it."""
    out: Tensor = block(*args)
    return out


class WanTransformer(nn.Module):
    """Predicts the velocity noise - x0 of noised latents.

    `compute_dtype` is what matmuls and attention run in and what their weights are declared in; `residual_dtype` is
    what the residual stream is kept in between updates; `attention` names a kernel and may be set later too.
    """

    def __init__(
        self,
        sizes: WanSizes,
        *,
        compute_dtype: torch.dtype = torch.float32,
        residual_dtype: torch.dtype = torch.float32,
        attention: str = "sdpa",
    ) -> None:
        super().__init__()
        self.sizes = sizes
        self.compute_dtype = compute_dtype
        self.residual_dtype = residual_dtype
        self.run_block: Callable[..., Tensor] = run_directly
        self.rope = RopeTables(sizes.head_dim)
        dim = sizes.dim
        self.patch_embedding = PatchEmbedding(sizes.in_channels, dim, compute_dtype)
        self.text_embedding = nn.Sequential(
            nn.Linear(sizes.text_dim, dim, dtype=compute_dtype),
            nn.GELU(approximate="tanh"),
            nn.Linear(dim, dim, dtype=compute_dtype),
        )
        self.time_embedding = nn.Sequential(Float32Linear(sizes.freq_dim, dim), nn.SiLU(), Float32Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), Float32Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList([WanBlock(sizes, compute_dtype) for _ in range(sizes.num_layers)])
        self.head = Head(dim, sizes.out_channels, sizes.eps)
        self.attention = attention

    @property
    def attention(self) -> str:
        """Name of the attention kernel. Setting it raises `ConfigError` if its package is missing."""
        return self._attention

    @attention.setter
    def attention(self, kernel: str) -> None:
        require_kernel(kernel)
        self._attention = kernel
        for block in self.blocks:
            assert isinstance(block, WanBlock)
            block.self_attn.kernel = kernel
            block.cross_attn.kernel = kernel

    def forward(self, x_BCFHW: Tensor, timestep_B: Tensor, text: Sequence[Tensor] | Tensor) -> Tensor:
        """Velocity [B, C, F, H, W] float32.

        `x_BCFHW` latents of any float dtype, H and W even; `timestep_B` on the 0..1000 scale, one per sample;
        `text` B embeddings [T_i, text_dim], T_i at most `text_len`, or what `pad_text` makes of them.
        """
        latent = LatentShape(*x_BCFHW.shape[2:])
        x_BLD = self.patch_embedding(x_BCFHW.to(self.compute_dtype)).to(self.residual_dtype)
        time_BD, time_B6D = self.embed_time(timestep_B)
        text_BTD = self.embed_text(text, x_BLD.device)
        rope_2Lk = self.rope.get(latent, x_BLD.device)
        for block in self.blocks:
            x_BLD = self.run_block(block, x_BLD, time_B6D, text_BTD, rope_2Lk)
        return unpatchify(self.head(x_BLD, time_BD), latent)

    def embed_time(self, timestep_B: Tensor) -> tuple[Tensor, Tensor]:
        """The time embedding [B, D] for the head and its projection [B, 6, D] for the blocks, float32."""
        time_BD = self.time_embedding(sinusoid(timestep_B, self.sizes.freq_dim))
        return time_BD, self.time_projection(time_BD).unflatten(-1, (6, -1))

    def pad_text(self, text: Sequence[Tensor], device: torch.device) -> Tensor:
        """Embeddings [T_i, text_dim] with zeros below them, [B, T, text_dim] in the compute dtype.

        Wan was trained with zeros padded to `text_len` before the network, and the rows they become are attended to.
        Only as many of them are computed as are needed: they are all alike (`WanCrossAttention`).
        """
        return pad_texts(text, text_rows(max(map(len, text)), self.sizes.text_len), device, self.compute_dtype)

    def embed_text(self, text: Sequence[Tensor] | Tensor, device: torch.device) -> Tensor:
        """Text tokens [B, T, D] in the compute dtype, T at most `text_len`, of embeddings or of padded ones."""
        tokens: Tensor = self.text_embedding(text if isinstance(text, Tensor) else self.pad_text(text, device))
        return tokens
