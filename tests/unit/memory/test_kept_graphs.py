"""What the compiler has made of blocks is there for later starts, and is taken for nothing else."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.unit.memory.wan import adapted_wan, train_step
from wanlora.memory.compile import compile_blocks
from wanlora.memory.saving import Save
from wanlora.quantization.linear import Fp8Linear

WAYS: tuple[Save, ...] = ("products", "attention")


@pytest.fixture(autouse=True)
def _nothing_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    start_again()
    yield
    torch._dynamo.reset()


def start_again() -> None:
    torch._dynamo.reset()
    counters.clear()


class _Fp8Block(nn.Module):
    """Attention of what a frozen fp8 linear makes, whose backward is its own, by a chosen backend as on a card."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = Fp8Linear.quantized(nn.Linear(64, 64)).requires_grad_(False)
        self.scale = nn.Parameter(torch.rand(64))

    def forward(self, x_BLD: Tensor) -> Tensor:
        q_BNLK = self.base(x_BLD * self.scale).sin().unflatten(-1, (4, 16)).transpose(1, 2)
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], set_priority=True):
            attended = F.scaled_dot_product_attention(q_BNLK, q_BNLK, q_BNLK)
        return x_BLD + attended.transpose(1, 2).flatten(2)


def trained(block: nn.Module, **options: Any) -> list[Tensor]:
    """Output and gradients."""
    x_BLD = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(1))
    output = block(x_BLD, **options)
    weights = [weight for weight in block.parameters() if weight.requires_grad]
    return [output.detach(), *torch.autograd.grad(output.square().mean(), weights)]


def test_a_later_start_finds_the_cut_graphs_of_fp8_blocks_for_every_way_to_save() -> None:
    def start() -> dict[Save, list[Tensor]]:
        start_again()
        block = _Fp8Block()
        compile_blocks([block], fullgraph=True)
        return {save: trained(block, save=save) for save in WAYS}

    plain = trained(_Fp8Block())
    first, ways = start(), len(WAYS)
    assert counters["aot_autograd"]["autograd_cache_saved"] == ways
    later = start()
    assert counters["aot_autograd"]["autograd_cache_hit"] == ways
    assert not counters["aot_autograd"]["autograd_cache_bypass"] + counters["aot_autograd"]["autograd_cache_miss"]
    for save in WAYS:
        torch.testing.assert_close(first[save], plain)
        assert all(map(torch.equal, later[save], first[save]))


def test_graphs_of_wan_blocks_are_such_that_the_compiler_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._functorch._aot_autograd.autograd_cache import check_cacheable

    kept: list[bool] = []

    def compile_fx(graph: torch.fx.GraphModule, inputs: object, config_patches: dict[str, Any]) -> object:
        with torch._inductor.config.patch(config_patches):
            check_cacheable(graph)
        kept.append(True)
        return graph.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    model = adapted_wan(2, dropout=0.1)
    compile_blocks(list(model.blocks), fullgraph=True)
    train_step(model)
    assert kept == [True]


def scaling(factor: float) -> nn.Module:
    """A block whose backward multiplies by `factor`, unlike its forward."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 1.0

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient * factor

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.ones(64))

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = Function.apply(x + self.bias)
            return result

    return Block()


def test_blocks_that_differ_in_their_own_backward_alone_are_told_apart() -> None:
    expected, gradients = [], []
    for factor in (2.0, 3.0):
        start_again()
        block = scaling(factor)
        expected.append(trained(block)[1])
        compile_blocks([block], fullgraph=True)
        gradients.append(trained(block)[1])
        assert counters["aot_autograd"]["autograd_cache_saved"] == 1
        assert not counters["aot_autograd"]["autograd_cache_hit"]
    assert not torch.equal(*expected)
    torch.testing.assert_close(gradients, expected)
