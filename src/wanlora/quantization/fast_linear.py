"""A frozen linear layer that multiplies in eight bits, forward and backward.

Its weight is e4m3 with one scale for each output: W = s W8. Forward quantises every token and multiplies:

    y = x W^T + b = scale_x s (x8 W8^T) + b

The gradient of the input needs the sum over outputs, along which s varies, so s cannot be applied afterwards. It is
multiplied into the gradient before that is quantised:

    dx = g W = (g s) W8

Cards multiply 8-bit matrices only if both lie along the summed side, so W8 is transposed for backward, where it is used
and for as long as it is used: one pass over a byte per weight, about 10 ms of a training step of the 14B model. A layer
that has `across`, the same numbers transposed, reads those instead; they take as much memory as the weight
(`transposed.py`).

Nothing is saved but the weight, or `across` in its place, and the scales, which backward reads where they are by then
(see `linear.py`). With `kernel` None a layer computes as `Fp8Linear` does, on the same weight.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from wanlora.quantization.blockwise import quantize_blockwise
from wanlora.quantization.linear import Fp8Linear
from wanlora.quantization.scaled_matmul import Kernel, choose_kernel, fits, quantize_rows, scaled_matmul


def output(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, kernel: Kernel) -> Tensor:
    """x [..., in] to [..., out] in the dtype of x, for W = weight * scale with a scale [out, 1, 1]."""
    x8, scale_x = quantize_rows(x.flatten(0, -2))
    out = scaled_matmul(x8, scale_x, weight, scale.flatten(), bias, dtype=x.dtype, kernel=kernel)
    return out.unflatten(0, x.shape[:-1])


def input_gradient(grad: Tensor, weight: Tensor, scale: Tensor, kernel: Kernel) -> Tensor:
    """The gradient of x [..., in] from that of the output [..., out]."""
    return _gradient_across(grad, weight.t().contiguous(), scale, kernel)


def _gradient_across(grad: Tensor, across: Tensor, scale: Tensor, kernel: Kernel) -> Tensor:
    """`input_gradient` for a weight that lies transposed, [in, out]."""
    grad8, scale_grad = quantize_rows(grad.flatten(0, -2).float() * scale.flatten())
    ones = torch.ones(across.shape[0], device=grad.device)
    out = scaled_matmul(grad8, scale_grad, across, ones, None, dtype=grad.dtype, kernel=kernel)
    return out.unflatten(0, grad.shape[:-1])


class _ScaledLinear(torch.autograd.Function):
    """y = x W^T + b and dx = g W in eight bits; W = weight * scale with one scale per row."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, across: Tensor | None, kernel: Kernel
    ) -> Tensor:
        ctx.save_for_backward(weight if across is None else across, scale)
        ctx.kernel = kernel
        ctx.gradient = input_gradient if across is None else _gradient_across
        return output(x, weight, scale, bias, kernel)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        weight, scale = ctx.saved_tensors
        return ctx.gradient(grad, weight, scale, ctx.kernel), None, None, None, None, None


class FastFp8Linear(Fp8Linear):
    """y = x W^T + b with a frozen fp8 weight, multiplied in eight bits.

    `weight` e4m3 [out, in], both multiples of 16; `scale` float32 [out, 1, 1]; `bias` [out] in the compute dtype, or
    None. `kernel` says how (see `scaled_matmul.py`); None turns fp8 maths off and the weight is widened instead.
    `across` is the weight transposed, e4m3 [in, out], once `transpose` has been called; no file holds it.
    """

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor | None = None,
        *,
        compute_dtype: torch.dtype = torch.bfloat16,
        kernel: Kernel | None,
    ) -> None:
        if weight.dtype is not torch.float8_e4m3fn or not fits(*weight.shape):
            raise ValueError(f"fp8 maths want e4m3 weights with sides of 16, not {weight.dtype} {tuple(weight.shape)}")
        if scale.shape != (weight.shape[0], 1, 1):
            raise ValueError(f"fp8 maths want one scale for each output, not a scale of shape {tuple(scale.shape)}")
        super().__init__(weight, scale, bias, compute_dtype=compute_dtype)
        self.kernel = kernel
        self.across: Tensor | None
        self.register_buffer("across", None, persistent=False)

    @classmethod
    def quantized(
        cls, linear: nn.Linear, *, block: int | None = None, compute_dtype: torch.dtype | None = None
    ) -> Self:
        """Quantise a linear, to be multiplied as its device can. `block` can only be a whole row."""
        if block not in (None, linear.in_features):
            raise ValueError(f"fp8 maths want one scale for each output, not one for {block} inputs")
        weight, scale = quantize_blockwise(linear.weight.detach(), linear.in_features)
        dtype = compute_dtype or linear.weight.dtype
        bias = None if linear.bias is None else linear.bias.detach().to(dtype)
        return cls(weight, scale, bias, compute_dtype=dtype, kernel=choose_kernel(weight.device))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] to [..., out]."""
        if self.kernel is None:
            return super().forward(x)
        out: Tensor = _ScaledLinear.apply(x, self.weight, self.scale, self.bias, self.across, self.kernel)
        return out

    def transpose(self) -> None:
        """Let backward read the weight transposed from now on, in as much memory again."""
        self.across = self.weight.detach().t().contiguous()


def fast_layers(model: nn.Module) -> dict[str, FastFp8Linear]:
    """The layers of `model` that multiply in eight bits, by module path."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, FastFp8Linear)}
    return {name: layer for name, layer in found.items() if layer.kernel is not None}


@contextmanager
def wide_maths(layers: Iterable[FastFp8Linear]) -> Iterator[None]:
    """Within the block these layers widen their weights and multiply as `Fp8Linear` does."""
    before = [(layer, layer.kernel) for layer in layers]
    for layer, _ in before:
        layer.kernel = None
    try:
        yield
    finally:
        for layer, kernel in before:
            layer.kernel = kernel
