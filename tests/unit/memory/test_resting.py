"""What rests on the card, against a model that is filled as the loader fills it."""

from dataclasses import replace
from typing import get_args, get_type_hints

import pytest
import torch
from torch import nn

from tests.unit.memory.adapters import adapter_parameters
from tests.unit.memory.kept import adapted_block
from wanlora.memory.footprint import BlockMaths
from wanlora.memory.resting import WeightFormats, block_weights, linear_sizes, outer_weights
from wanlora.models.wan.spec import WanSizes
from wanlora.models.wan.transformer import WanTransformer

SIZES = WanSizes(dim=256, ffn_dim=704, num_layers=2, text_dim=48, freq_dim=32)


@pytest.mark.parametrize("fp8", [True, False])
@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float32])
def test_a_block_weighs_what_its_tensors_do(fp8: bool, compute: torch.dtype) -> None:
    block = adapted_block(BlockMaths(sizes=SIZES, fp8=fp8, compute=compute, adapted=()))
    assert block_weights(SIZES, WeightFormats(compute=compute, fp8=fp8)) == _num_bytes(block)


def test_scales_are_by_block_by_row_or_one() -> None:
    formats = WeightFormats(compute=torch.bfloat16, fp8=True)
    scaled, rows, plain = (
        block_weights(SIZES, replace(formats, scales=scales))
        for scales in get_args(get_type_hints(WeightFormats)["scales"])
    )
    linears = linear_sizes(SIZES).values()
    assert scaled - plain == 4 * (sum(out * into // 64 for out, into in linears) - 10)
    assert rows - plain == 4 * (sum(out for out, _ in linears) - 10)


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float32])
def test_what_is_outside_of_the_blocks_weighs_what_its_tensors_do(compute: torch.dtype) -> None:
    with torch.device("meta"):
        model = WanTransformer(SIZES, compute_dtype=compute)
    model.blocks = nn.ModuleList()
    formats = WeightFormats(compute=compute, islands=torch.float32)
    assert outer_weights(SIZES, formats) == _num_bytes(model)


def test_adapters_have_two_factors_for_every_layer() -> None:
    block = adapted_block(BlockMaths(sizes=SIZES, rank=8))
    trained = sum(parameter.numel() for parameter in block.parameters() if parameter.requires_grad)
    assert adapter_parameters(SIZES, 8) == trained


def _num_bytes(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))
