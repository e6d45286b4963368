"""Modules without memory."""

import torch
from torch import nn

from tests.fresh import run_fresh
from wanlora.foundation.blank import without_memory
from wanlora.models.wan.transformer import WanTransformer
from wanlora.quickstart.tiny_model import SIZES


def test_modules_without_memory_have_the_parameters_of_ordinary_ones() -> None:
    with without_memory():
        blank = WanTransformer(SIZES)
    whole = WanTransformer(SIZES)
    shapes = [{name: (tensor.shape, tensor.dtype) for name, tensor in m.named_parameters()} for m in (blank, whole)]
    assert shapes[0] == shapes[1]
    assert all(parameter.is_meta for parameter in blank.parameters())
    assert not any(parameter.is_meta for parameter in whole.parameters())


def test_no_number_is_drawn_for_them() -> None:
    before = torch.get_rng_state()
    with without_memory():
        layer = nn.Linear(4, 4)
        nn.init.normal_(tensor=layer.bias)
    assert layer.bias.is_meta and torch.equal(torch.get_rng_state(), before)


def test_making_and_adapting_one_does_not_load_the_compiler() -> None:
    """In a process of its own: here somebody may have loaded it long ago."""
    code = (
        "import sys, torch\n"
        "from wanlora.foundation.blank import without_memory\n"
        "from wanlora.lora.network import inject\n"
        "from wanlora.models.wan.transformer import WanTransformer\n"
        "from wanlora.models.wan.umt5 import UMT5Encoder\n"
        "from wanlora.models.wan.vae import WanVAE\n"
        "from wanlora.quickstart.tiny_model import SIZES\n"
        "with without_memory():\n"
        "    model, others = WanTransformer(SIZES), (WanVAE(), UMT5Encoder())\n"
        "    inject(model, ['blocks.0.ffn.0'], rank=2, generator=torch.Generator())\n"
        "assert not {'torch._dynamo', 'sympy'} & set(sys.modules)\n"
    )
    run_fresh(code)
