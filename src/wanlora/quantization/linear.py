"""A frozen linear layer whose weight is eight bits wide.

The weight is turned into the compute dtype where it is used and forgotten at once. Ordinary autograd would keep that
copy of every layer until backward, which is the very memory that eight bits are meant to save; here backward makes it
again from the weight that is saved anyway. The cost is one more pass over the weight, about 1 % of a training step.

Only the input gets a gradient. What backward reads are the layer's own tensors, not copies, so a weight that somebody
moves between forward and backward (streaming) is read from where it is then.
"""

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanlora.quantization.blockwise import BLOCK, dequantize, quantize_blockwise


class _FrozenLinear(torch.autograd.Function):
    """y = x W^T + b with W = weight * scale; saves nothing that is wider than the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return F.linear(x, dequantize(weight, scale, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        weight, scale = ctx.saved_tensors
        return grad @ _dequantize_in_backward(weight, scale, grad.dtype), None, None, None


def _dequantize_in_backward(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`dequantize`, written so that it begins with another operation.

    A compiler that sees the same expression in forward and backward makes it one and keeps the wide result in between.
    """
    return weight.unflatten(1, (scale.shape[1], -1)).to(dtype).mul_(scale).flatten(1)


class Fp8Linear(nn.Module):
    """y = x W^T + b with a frozen fp8 weight; takes the place of a frozen `nn.Linear`.

    `weight` fp8 [out, in]; `scale` float32 [out or 1, blocks, 1] with W = weight * scale; `bias` [out] in the compute
    dtype, or None. Inputs must be in `compute_dtype`; outputs are.
    """

    def __init__(
        self, weight: Tensor, scale: Tensor, bias: Tensor | None = None, *, compute_dtype: torch.dtype = torch.bfloat16
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale: Tensor
        self.register_buffer("scale", scale)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.out_features, self.in_features = weight.shape
        self.compute_dtype = compute_dtype

    @classmethod
    def quantized(cls, linear: nn.Linear, *, block: int = BLOCK, compute_dtype: torch.dtype | None = None) -> Self:
        """Quantise a linear; the compute dtype is that of its weight unless another is named."""
        weight, scale = quantize_blockwise(linear.weight.detach(), block)
        dtype = compute_dtype or linear.weight.dtype
        bias = None if linear.bias is None else linear.bias.detach().to(dtype)
        return cls(weight, scale, bias, compute_dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] to [..., out]."""
        out: Tensor = _FrozenLinear.apply(x, self.weight, self.scale, self.bias)
        return out

    def dequantized(self) -> Tensor:
        """The weight [out, in] in the compute dtype."""
        return dequantize(self.weight, self.scale, self.compute_dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
