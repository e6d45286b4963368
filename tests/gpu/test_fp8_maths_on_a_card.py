"""Products in fp8 on a card (sm_89 or newer): the emulation's numbers for any number of tokens, compiled, streamed."""

import pytest
import torch
from torch import Tensor, nn

from wanlora.memory.checkpointing import Recompute
from wanlora.memory.compile import compile_blocks
from wanlora.memory.streaming import BlockStream
from wanlora.quantization.blockwise import quantize_blockwise
from wanlora.quantization.fast_linear import FastFp8Linear, input_gradient, output
from wanlora.quantization.scaled_matmul import (
    Kernel,
    choose_kernel,
    missing_fp8_maths,
    quantize_rows,
    scaled_matmul,
)

CARD = torch.device("cuda", 0)
pytestmark = pytest.mark.gpu
KERNELS: tuple[Kernel, ...] = ("rows", "tensor")


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.float() - exact.float()).norm() / exact.float().norm())


def make_weight(num_out: int, num_in: int) -> tuple[Tensor, Tensor]:
    weight = torch.randn(num_out, num_in, device=CARD) * torch.logspace(-3, 0, num_out, device=CARD)[:, None]
    return quantize_blockwise(weight * num_in**-0.5, num_in)


def test_rounding_is_the_same_on_the_card_and_on_the_host() -> None:
    x = torch.randn(37, 512, device=CARD, dtype=torch.bfloat16) * torch.logspace(-20, 20, 37, device=CARD)[:, None]
    fp8, scale = quantize_rows(x)
    expected, expected_scale = quantize_rows(x.cpu())
    assert torch.equal(scale.cpu(), expected_scale)
    assert torch.equal(fp8.cpu().view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("tokens", [1, 7, 130, 1248, 2305])
def test_the_product_equals_the_emulated_one_for_any_number_of_tokens(kernel: Kernel, tokens: int) -> None:
    torch.manual_seed(tokens)
    weight, scale = make_weight(768, 512)
    bias = torch.randn(768, device=CARD, dtype=torch.bfloat16)
    a, scale_a = quantize_rows(torch.randn(tokens, 512, device=CARD))
    arguments = (a, scale_a, weight, scale.flatten(), bias)
    exact = scaled_matmul(*arguments, dtype=torch.float32, kernel="emulated")
    assert relative(scaled_matmul(*arguments, dtype=torch.bfloat16, kernel=kernel), exact) < 0.005


@pytest.mark.parametrize("kernel", KERNELS)
def test_output_and_input_gradient_equal_the_emulated_ones(kernel: Kernel) -> None:
    torch.manual_seed(0)
    weight, scale = make_weight(1536, 5120)
    x = torch.randn(2, 99, 5120, device=CARD, dtype=torch.bfloat16)
    grad = torch.randn(2, 99, 1536, device=CARD, dtype=torch.bfloat16) * 1e-9
    assert relative(output(x, weight, scale, None, kernel), output(x, weight, scale, None, "emulated")) < 0.006
    ours, exact = (input_gradient(grad, weight, scale, way) for way in (kernel, "emulated"))
    assert relative(ours, exact) < 0.006


class Block(nn.Module):
    """A residual pair of layers that multiply in fp8."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(512).requires_grad_(False)
        self.up = FastFp8Linear(*make_weight(1024, 512), kernel=kernel)
        self.down = FastFp8Linear(*make_weight(512, 1024), kernel=kernel)

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.gelu(self.up(self.norm(x).bfloat16()), approximate="tanh")
        return x + self.down(hidden)


@pytest.mark.parametrize("kernel", KERNELS)
def test_compiled_and_streamed_layers_agree_with_plain_ones(kernel: Kernel) -> None:
    torch._dynamo.reset()
    torch.manual_seed(1)
    blocks = nn.ModuleList([Block(kernel) for _ in range(4)]).to(CARD)
    inputs = [torch.randn(1, tokens, 512, device=CARD) for tokens in (300, 77)]

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        runner, out = Recompute(list(blocks)), x
        for block in blocks:
            out = runner(block, out)
        (gradient,) = torch.autograd.grad(out.square().mean(), x)
        return out.detach(), gradient

    expected = [run(x) for x in inputs]
    stream = BlockStream(list(blocks), 4, CARD)
    stream.attach()
    compile_blocks(blocks, fullgraph=True)
    for x, (out, gradient) in zip(inputs, expected, strict=True):
        found, found_gradient = run(x)
        assert relative(found, out) < 0.005 and relative(found_gradient, gradient) < 0.02
    torch._dynamo.reset()


def test_a_card_with_the_units_uses_them() -> None:
    assert missing_fp8_maths(CARD) is None
    assert choose_kernel(CARD) in KERNELS
