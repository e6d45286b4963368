"""Matrix products in eight bits.

Cards from Ada and Hopper on multiply e4m3 matrices about twice as fast as bfloat16 ones. Both operands are scaled so
that the largest number of each row (of the second operand: of each column) becomes 448, the largest of e4m3; the sums
are taken in float32 and multiplied with the two scales:

    a_LK b_KN  =  scale_L1 scale_1N  sum_k a8_Lk b8_kN

A scale per row costs nothing in the product and keeps one token's large numbers from drowning the others. What is lost
is the mantissa: three bits, about 2.6 % of the norm of normally distributed numbers, and more for a row in which a few
numbers stand far above the rest.

The product runs in one of three ways. `rows`: the library applies both scales. `tensor`: it knows one scale for a whole
matrix only (PyTorch on Windows, for one), so it multiplies unscaled and a pass over the result follows. `emulated`: the
same rounded numbers multiplied in float32, for processors without such units.
"""

import os
from collections.abc import Sequence
from functools import cache, reduce
from typing import Literal

import torch
from torch import Tensor

Kernel = Literal["rows", "tensor", "emulated"]
MULTIPLE = 16
"""Both sides of a weight must be multiples of this; the number of tokens may be any."""
_CAPABILITY = (8, 9)
_HOPPER = (9, 0)


def quantize_rows(x_LK: Tensor) -> tuple[Tensor, Tensor]:
    """Round a matrix of any float dtype to e4m3 with a scale for each row: x = fp8 * scale, scale [L, 1] float32.

    A row that holds an infinity or a NaN becomes NaN; one whose largest number is below 1e-30 counts as zeros. Runs
    inside compiled graphs, where the search and the rounding join the operation that made `x_LK`. Its numbers are
    written out, because a graph takes named ones for inputs that may change.
    """
    (x8_LK,), scale_L1 = quantize_parts((x_LK,))
    return x8_LK, scale_L1


def quantize_parts(parts: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """`quantize_rows` for a matrix that comes in parts, [L, K_i] each, which have the scale of their row in common."""
    wide = [part.float() for part in parts]
    largest = [part.abs().amax(dim=1, keepdim=True) for part in wide]
    amax_L1 = reduce(torch.maximum, largest).clamp(min=1e-30)
    return [(part * (448.0 / amax_L1)).to(torch.float8_e4m3fn) for part in wide], amax_L1 * (1 / 448.0)


def scaled_matmul(
    a_LK: Tensor,
    scale_L1: Tensor,
    b_NK: Tensor,
    scale_N: Tensor,
    bias_N: Tensor | None,
    *,
    dtype: torch.dtype,
    kernel: Kernel,
) -> Tensor:
    """(scale_L1 a) (scale_N b)^T + bias, [L, N] in `dtype`.

    `a_LK` and `b_NK` are e4m3, both with contiguous rows, because the units of a card read along K only; scales are
    float32. K and N are multiples of 16. `rows` and `tensor` round to bfloat16 on their way to `dtype`.
    """
    if kernel == "emulated":
        sums = (a_LK.float() @ b_NK.float().t()) * scale_L1 * scale_N
        return (sums if bias_N is None else sums + bias_N).to(dtype)
    if kernel == "rows":
        scale_1N = scale_N.unsqueeze(0)
        bias = None if bias_N is None else bias_N.to(torch.bfloat16)
        return torch._scaled_mm(
            a_LK, b_NK.t(), scale_L1, scale_1N, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True
        ).to(dtype)
    one = torch.ones((), device=a_LK.device)
    sums = torch._scaled_mm(a_LK, b_NK.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True).float()
    scaled = sums * scale_L1 * scale_N
    return (scaled if bias_N is None else scaled + bias_N).to(dtype)


def fits(out_features: int, in_features: int) -> bool:
    """Whether a weight of this shape can be multiplied in eight bits, forward and backward."""
    return out_features % MULTIPLE == 0 and in_features % MULTIPLE == 0


@cache
def choose_kernel(device: torch.device) -> Kernel:
    """The way for this device: on a card the first that PyTorch has there, elsewhere the emulation."""
    if device.type != "cuda":
        return "emulated"
    try:
        _try("rows", device)
    except RuntimeError:
        return "tensor"
    return "rows"


def missing_fp8_maths(device: torch.device) -> str | None:
    """Why `device` cannot multiply in eight bits, as half a sentence; None if it can.

    Asked before anything is multiplied, because the library is told then how it should.
    """
    if device.type != "cuda":
        return "there is no CUDA card"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < _CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return f"the {name} (sm_{major}{minor}) has no units for it; cards from sm_89 on have (RTX 40, L40, H100)"
    if (major, minor) == _HOPPER:
        _take_no_workspace()
    try:
        _try("tensor", device)
    except RuntimeError as error:
        return f"this PyTorch cannot do it on this card ({str(error).splitlines()[0]})"
    return None


def _take_no_workspace() -> None:
    """Let cuBLAS multiply without memory of its own, unless the user has said how much it may take.

    With it, on an H100, it clears a counter there before each product and hands tiles out by that. Without, the same
    kernels share them out beforehand: 1 to 3 % less for a product at 1,248 to 3,744 tokens, as much at 7,488, and half
    as many things to queue. PyTorch reads this once, at the first such product.
    """
    os.environ.setdefault("CUBLASLT_WORKSPACE_SIZE", "0")


def _try(kernel: Kernel, device: torch.device) -> None:
    """Multiply two small matrices."""
    ones = torch.ones(MULTIPLE, MULTIPLE, device=device)
    a, scale_L1 = quantize_rows(ones)
    scaled_matmul(a, scale_L1, a, scale_L1.squeeze(1), None, dtype=torch.bfloat16, kernel=kernel)
