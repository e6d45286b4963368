"""Weights in eight bits, with a scale for every 64 inputs.

e4m3 has three bits of mantissa and reaches from 2^-9 to 448. A scale per block of 64 weights along the input puts the
largest of each block at 448, so every block uses the whole range and the error is that of the mantissa alone: about
2.5 % of the weight's norm for normally distributed weights. Scales are kept in float32 (they are 1/16 of the weight's
bytes); rounding them to bfloat16 would save 3 % and add another error. A width that 64 does not divide has one scale
a row.

The cast to e4m3 saturates only from torch 2.12 on, before that a value over 464 becomes NaN: values are clamped
first.
"""

import torch
from einops import rearrange
from torch import Tensor

FP8_MAX = 448.0
MIN_SCALE = 1e-8
BLOCK = 64


def to_fp8(values: Tensor) -> Tensor:
    """Round to e4m3, saturating at +-448 on every version of torch."""
    return values.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def has_blocks(in_features: int, block: int = BLOCK) -> bool:
    """Whether rows of this width are cut into blocks; if not they have one scale each."""
    return in_features % block == 0


def quantize_blockwise(weight: Tensor, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Quantise a matrix [out, in] of any float dtype.

    Returns e4m3 weights [out, in] and float32 scales [out, in / block, 1] ([out, 1, 1] if block does not divide in),
    so that weight = fp8 * scale.
    """
    width = block if has_blocks(weight.shape[1], block) else weight.shape[1]
    blocks = rearrange(weight.float(), "o (b w) -> o b w", w=width)
    low, high = blocks.aminmax(dim=-1, keepdim=True)
    # A product, because CUDA makes one of a division by a number: scales are the same bits on every device.
    scale = (torch.maximum(-low, high) * (1 / FP8_MAX)).clamp_(min=MIN_SCALE)
    return rearrange(to_fp8(blocks / scale), "o b w -> o (b w)"), scale


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """fp8 * scale in `dtype`, [out, in]. `scale` is [out or 1, blocks, 1] with blocks a divisor of in.

    The product is taken in float32 and rounded once; nothing larger than the result is allocated. This runs inside
    compiled graphs, where einops' table of backends would count as a side effect: hence plain reshapes.
    """
    return weight.to(dtype).unflatten(1, (scale.shape[1], -1)).mul_(scale).flatten(1)


def relative_error(weight: Tensor, quantized: Tensor, scale: Tensor) -> float:
    """Norm of the error over norm of the weight (Frobenius)."""
    exact = weight.float()
    error = torch.linalg.vector_norm(dequantize(quantized, scale, torch.float32) - exact)
    return float(error / torch.linalg.vector_norm(exact).clamp(min=torch.finfo(torch.float32).tiny))
