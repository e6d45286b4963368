"""What a block of a small Wan holds from forward to backward, counted."""

from collections.abc import Collection
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanlora.foundation.shapes import LatentShape
from wanlora.lora.layers import LoRALinear
from wanlora.memory.compile import compile_blocks
from wanlora.memory.footprint import BlockMaths
from wanlora.models.attention import KERNELS, Kernel
from wanlora.models.wan.blocks import WanBlock
from wanlora.models.wan.rope import rope_table
from wanlora.quantization.linear import Fp8Linear

LATENT = LatentShape(2, 16, 16)


def adapted_block(maths: BlockMaths) -> WanBlock:
    """An fp8 block with adapters as `maths` says."""
    torch.manual_seed(0)
    block = WanBlock(maths.sizes, maths.compute).requires_grad_(False)
    for name, linear in [*block.named_modules()]:
        if isinstance(linear, nn.Linear):
            base = Fp8Linear.quantized(linear) if maths.fp8 else linear
            adapted = name in maths.adapted
            block.set_submodule(
                name, LoRALinear(base, rank=maths.rank, scale=1.0, generator=torch.Generator()) if adapted else base
            )
    return block


def held_bytes(maths: BlockMaths, *, batch: int = 1, backend: str = "") -> int:
    """Bytes that autograd saves of one block beyond what is there anyway, the block's input included."""
    block = adapted_block(maths)
    if backend:
        compile_blocks([block], backend=backend)
    dim = maths.sizes.dim
    x_BLD = torch.randn(batch, LATENT.num_tokens, dim, dtype=maths.residual, requires_grad=True)
    shared = (
        torch.randn(batch, 6, dim),
        torch.randn(batch, maths.text_rows, dim, dtype=maths.compute),
        rope_table(LATENT, maths.sizes.head_dim, torch.device("cpu")),
    )
    there = _storages([*block.parameters(), *block.buffers(), *shared])
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with (
        patch.dict(KERNELS._entries, sdpa=Kernel(compute=_attention_on_a_card)),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        block(x_BLD, *shared)
    held = _storages([*saved, x_BLD])
    return sum(held[address] for address in held.keys() - there.keys())


def _storages(tensors: Collection[Tensor]) -> dict[int, int]:
    """Bytes of every distinct piece of memory, by its address."""
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def _attention_on_a_card(q_BLNK: Tensor, k_BTNK: Tensor, v_BTNK: Tensor) -> Tensor:
    """In the format of its inputs, whatever the CPU's own way is."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLNK, k_BTNK, v_BTNK))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
