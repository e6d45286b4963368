"""What a block of a small Wan holds from forward to backward, counted."""

from collections.abc import Callable, Collection
from typing import Any
from unittest.mock import patch

import torch
import torch._functorch.config as functorch_config
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table

from wanlora.foundation.shapes import LatentShape
from wanlora.lora.layers import Factor, LoRALinear
from wanlora.memory.compile import compile_blocks
from wanlora.memory.footprint import BlockMaths
from wanlora.memory.saving import Save, mark
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


def held_bytes(maths: BlockMaths, *, batch: int = 1, save: Save | None = None) -> int:
    """Bytes that autograd saves of one block beyond what is there anyway, the block's input included.

    `save` cuts the joint graph so, as a compiler would, and runs both parts as they are.
    """
    block = adapted_block(maths)
    if save:
        compile_blocks([block], backend=cutting_backend(save))
    dim, leaves = maths.sizes.dim, lend_copies(block, maths.compute) if maths.narrow else []
    x_BLD = torch.randn(batch, LATENT.num_tokens, dim, dtype=maths.residual, requires_grad=True)
    shared = (
        torch.randn(batch, 6, dim),
        torch.randn(batch, maths.text_rows, dim, dtype=maths.compute),
        rope_table(LATENT, maths.sizes.head_dim, torch.device("cpu")),
    )
    there = _storages([*block.parameters(), *block.buffers(), *leaves, *shared])
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


def lend_copies(block: WanBlock, dtype: torch.dtype) -> list[nn.Parameter]:
    """Copies of all factors of a block, which it computes with from now on."""
    factors = [module for module in block.modules() if isinstance(module, Factor)]
    leaves = [nn.Parameter(factor.weight.detach().to(dtype)) for factor in factors]
    for factor, leaf in zip(factors, leaves, strict=True):
        factor.lend(leaf)
    return leaves


def cutting_backend(save: Save) -> Callable[..., Any]:
    """A backend that partitions as `saving_backend` has it done and compiles nothing."""

    def partition(module: torch.fx.GraphModule, inputs: Any, **options: Any) -> Any:
        mark(module.graph, save)
        with functorch_config.patch(aggressive_recomputation=save != "everything"):
            return min_cut_rematerialization_partition(module, inputs, **options)

    return aot_autograd(
        fw_compiler=lambda graph, _: make_boxed_func(graph.forward),
        partition_fn=partition,
        decompositions=select_decomp_table(),
    )


def _storages(tensors: Collection[Tensor]) -> dict[int, int]:
    """Bytes of every distinct piece of memory, by its address."""
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def _attention_on_a_card(q_BLNK: Tensor, k_BTNK: Tensor, v_BTNK: Tensor) -> Tensor:
    """In the format of its inputs, whatever the CPU's own way is."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLNK, k_BTNK, v_BTNK))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
