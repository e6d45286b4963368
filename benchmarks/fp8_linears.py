"""Times of the frozen linear layers of the 14B model: weights widened and multiplied in bf16, and multiplied in fp8.

Usage: python benchmarks/fp8_linears.py [--results DIR]     needs a CUDA card with fp8 units

For every number of tokens of the reference mix and every shape of weight: the forward pass and the gradient of the
input, each as one compiled call (`forward`, `backward`), and the parts of which the fp8 one is made: rounding the
tokens, the product, rounding the gradient, transposing the weight. In a compiled block the roundings join what comes
before them, so they cost less there than here. Medians of `triton.testing.do_bench`, which empties the cache between
calls.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.testing import do_bench

from wanlora.foundation.files import write_json
from wanlora.quantization.blockwise import dequantize, quantize_blockwise
from wanlora.quantization.fast_linear import FastFp8Linear, input_gradient, output
from wanlora.quantization.scaled_matmul import Kernel, choose_kernel, quantize_rows, scaled_matmul

TOKENS = (1248, 2304, 3744, 7488)
SHAPES = ((5120, 5120), (13824, 5120), (5120, 13824))
"""Outputs and inputs."""


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path(__file__).resolve().parent / "results")
    options = parser.parse_args()
    device = torch.device("cuda")
    kernel = choose_kernel(device)
    rows = []
    for shape in SHAPES:
        torch._dynamo.reset()  # a graph for each shape and any number of tokens, as in a compiled block
        rows += [measure(tokens, shape, kernel, device) for tokens in TOKENS]
    write_json(
        options.results / "fp8-linears-h100.json",
        {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "kernel": kernel, "milliseconds": rows},
    )


def measure(tokens: int, shape: tuple[int, int], kernel: Kernel, device: torch.device) -> dict[str, Any]:
    """Milliseconds of each call and part for one shape."""
    num_out, num_in = shape
    weight = torch.randn(shape, device=device, dtype=torch.bfloat16) * num_in**-0.5
    bias = torch.randn(num_out, device=device, dtype=torch.bfloat16)
    x = torch.randn(tokens, num_in, device=device, dtype=torch.bfloat16)
    grad = torch.randn(tokens, num_out, device=device, dtype=torch.bfloat16)
    blocks = quantize_blockwise(weight)
    fp8, scale = quantize_blockwise(weight, num_in)
    x8, grad8 = quantize_rows(x), quantize_rows(grad.float() * scale.flatten())
    across, ones = fp8.t().contiguous(), torch.ones(num_in, device=device)
    product = partial(scaled_matmul, dtype=torch.bfloat16, kernel=kernel)
    torch._dynamo.mark_dynamic(x, 0)
    torch._dynamo.mark_dynamic(grad, 0)
    calls: dict[str, Callable[[], Any]] = {
        "bf16 forward": lambda: _bf16_forward(x, *blocks, bias),
        "bf16 backward": lambda: _bf16_backward(grad, *blocks),
        "bf16 product": lambda: x @ weight.t(),
        "fp8 forward": lambda: _fp8_forward(x, fp8, scale, bias, kernel),
        "fp8 backward": lambda: _fp8_backward(grad, fp8, scale, kernel),
        "fp8 product": lambda: product(*x8, fp8, scale.flatten(), bias),
        "fp8 backward product": lambda: product(*grad8, across, ones, None),
        "rounding tokens": lambda: _round(x),
        "rounding gradient": lambda: _round_scaled(grad, scale),
        "transposing": lambda: _transpose(fp8),
        "transposing, not compiled": lambda: fp8.t().contiguous(),
    }
    row: dict[str, Any] = {"tokens": tokens, "out": num_out, "in": num_in}
    row |= {name: do_bench(call, warmup=10, rep=40, return_mode="median") for name, call in calls.items()}
    row["fp8 product PFLOP/s"] = 2 * tokens * num_out * num_in / row["fp8 product"] / 1e12
    row |= _errors(x, grad, FastFp8Linear(fp8, scale, bias, kernel=kernel))
    print(" ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)
    return row


_fp8_forward, _fp8_backward, _round = torch.compile(output), torch.compile(input_gradient), torch.compile(quantize_rows)


@torch.compile
def _bf16_forward(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, dequantize(weight, scale, x.dtype), bias)


@torch.compile
def _bf16_backward(grad: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return grad @ dequantize(weight, scale, grad.dtype)


@torch.compile
def _round_scaled(grad: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return quantize_rows(grad.float() * scale.flatten())


@torch.compile
def _transpose(weight: Tensor) -> Tensor:
    return weight.t().contiguous()


def _errors(x: Tensor, grad: Tensor, layer: FastFp8Linear) -> dict[str, float]:
    """Relative errors of output and input gradient against float32 maths on the same weight."""
    wide = dequantize(layer.weight, layer.scale, torch.float32)
    exact, exact_gradient = torch.nn.functional.linear(x.float(), wide, layer.bias.float()), grad.float() @ wide
    assert layer.kernel is not None
    found = output(x, layer.weight, layer.scale, layer.bias, layer.kernel)
    gradient = input_gradient(grad, layer.weight, layer.scale, layer.kernel)
    return {
        "forward error": ((found - exact).norm() / exact.norm()).item(),
        "backward error": ((gradient - exact_gradient).norm() / exact_gradient.norm()).item(),
    }


if __name__ == "__main__":
    main()
