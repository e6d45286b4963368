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

Layers of one input (queries, keys and values) have one gradient between them, the sum of theirs. It is one product:
gradients side by side times transposed weights one below the other, with one scale for a token's whole row; what is
small beside the rest may be rounded as coarsely as the rest. Two results less are written and read again, 8 bytes for
each token and element of the width. Weights are laid side by side for it each time, unless they are kept so
(`transpose_together`).

Nothing is saved but the weight, or `across` in its place, and the scales, which backward reads where they are by then
(see `linear.py`). With `kernel` None a layer computes as `Fp8Linear` does, on the same weight.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, Self

import torch
from torch import Tensor, nn

from wanlora.quantization.blockwise import quantize_blockwise
from wanlora.quantization.linear import Fp8Linear
from wanlora.quantization.scaled_matmul import Kernel, choose_kernel, fits, quantize_parts, quantize_rows, scaled_matmul


def output(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, kernel: Kernel) -> Tensor:
    """x [..., in] to [..., out] in the dtype of x, for W = weight * scale with a scale [out, 1, 1]."""
    x8, scale_x = quantize_rows(x.flatten(0, -2))
    out = scaled_matmul(x8, scale_x, weight, scale.flatten(), bias, dtype=x.dtype, kernel=kernel)
    return out.unflatten(0, x.shape[:-1])


def input_gradient(grad: Tensor, weight: Tensor, scale: Tensor, kernel: Kernel) -> Tensor:
    """The gradient of x [..., in] from that of the output [..., out]."""
    return _gradient_across((grad,), (scale,), weight.t().contiguous(), kernel)


def _gradient_across(grads: Sequence[Tensor], scales: Sequence[Tensor], across: Tensor, kernel: Kernel) -> Tensor:
    """The gradient of an input that layers share; their weights lie transposed and side by side, [in, sum of out]."""
    scaled = [grad.flatten(0, -2).float() * scale.flatten() for grad, scale in zip(grads, scales, strict=True)]
    parts, scale_grad = quantize_parts(scaled)
    grad8 = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
    ones = torch.ones(across.shape[0], device=across.device)
    out = scaled_matmul(grad8, scale_grad, across, ones, None, dtype=grads[0].dtype, kernel=kernel)
    return out.unflatten(0, grads[0].shape[:-1])


class _ScaledLinear(torch.autograd.Function):
    """y = x W^T + b and dx = g W in eight bits; W = weight * scale with one scale per row."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, across: Tensor | None, kernel: Kernel
    ) -> Tensor:
        ctx.save_for_backward(weight if across is None else across, scale)
        ctx.kernel = kernel
        ctx.transposed = across is not None
        return output(x, weight, scale, bias, kernel)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        weight, scale = ctx.saved_tensors
        across = weight if ctx.transposed else weight.t().contiguous()
        return _gradient_across((grad,), (scale,), across, ctx.kernel), None, None, None, None, None


class _ScaledLinears(torch.autograd.Function):
    """`_ScaledLinear` of several layers for one input.

    `tensors`: weights, scales, biases; then transposed weights, if there are any, one by one or all side by side.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Kernel, number: int, *tensors: Any) -> tuple[Tensor, ...]:
        weights, scales, biases = (tensors[first : first + number] for first in range(0, 3 * number, number))
        across = tensors[3 * number :]
        ctx.save_for_backward(*(across or weights), *scales)
        ctx.kernel = kernel
        ctx.transposed = len(across) > 0
        return tuple(output(x, *layer, kernel) for layer in zip(weights, scales, biases, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # may be asked for once only
        weights, scales = saved[: -len(grads)], saved[-len(grads) :]
        parts = [weight if ctx.transposed else weight.t() for weight in weights]
        across = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        unneeded = [None] * (len(ctx.needs_input_grad) - 1)
        return _gradient_across(grads, scales, across, ctx.kernel), *unneeded


class FastFp8Linear(Fp8Linear):
    """y = x W^T + b with a frozen fp8 weight, multiplied in eight bits.

    `weight` e4m3 [out, in], both multiples of 16; `scale` float32 [out, 1, 1]; `bias` [out] in the compute dtype, or
    None. `kernel` says how (see `scaled_matmul.py`); None turns fp8 maths off and the weight is widened instead.
    `across` is the weight transposed, e4m3 [in, out], once `transpose` has been called; no file holds it. After
    `transpose_together` it is a part of `across_all` of the first of these layers, [in, sum of out].
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
        self.across_all: Tensor | None
        self.register_buffer("across", None, persistent=False)
        self.register_buffer("across_all", None, persistent=False)

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

    @staticmethod
    def together(x: Tensor, layers: "Sequence[FastFp8Linear]") -> tuple[Tensor, ...]:
        """Several layers of one input (see `project`): if it gets a gradient, that is one product for all of them."""
        kernel, across = layers[0].kernel, [layer.across for layer in layers if layer.across is not None]
        alike = all(layer.kernel == kernel for layer in layers) and len(across) in (0, len(layers))
        if kernel is None or not alike or not (torch.is_grad_enabled() and x.requires_grad):
            return tuple(layer(x) for layer in layers)
        side_by_side = layers[0].across_all
        if across and side_by_side is not None and side_by_side.shape[1] == sum(len(layer.weight) for layer in layers):
            across = [side_by_side]
        tensors = chain.from_iterable(zip(*((layer.weight, layer.scale, layer.bias) for layer in layers), strict=True))
        outs: tuple[Tensor, ...] = _ScaledLinears.apply(x, kernel, len(layers), *tensors, *across)
        return outs

    def transpose(self) -> None:
        """Let backward read the weight transposed from now on, in as much memory again."""
        self.across = self.weight.detach().t().contiguous()

    @staticmethod
    def transpose_together(layers: "Sequence[FastFp8Linear]") -> None:
        """`transpose` for layers of one input: side by side, as the gradient that they share needs them."""
        layers[0].across_all = torch.cat([layer.weight.detach().t() for layer in layers], dim=1)
        sizes = [len(layer.weight) for layer in layers]
        for layer, part in zip(layers, layers[0].across_all.split(sizes, dim=1), strict=True):
            layer.across = part

    def forget_transposed(self) -> None:
        """Let backward transpose the weight again."""
        self.across = self.across_all = None


def fast_layers(model: nn.Module) -> dict[str, FastFp8Linear]:
    """The layers of `model` that multiply in eight bits, by module path."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, FastFp8Linear)}
    return {name: layer for name, layer in found.items() if layer.kernel is not None}


def layers_by_input(model: nn.Module) -> list[tuple[FastFp8Linear, ...]]:
    """`fast_layers`, those together whose module says that they get the same input (`ONE_INPUT`)."""
    fast = set(fast_layers(model).values())
    groups: list[tuple[FastFp8Linear, ...]] = []
    for module in model.modules():
        named = [getattr(module, name) for name in getattr(module, "ONE_INPUT", ())]
        layers = tuple(getattr(linear, "base", linear) for linear in named)
        if len(layers) > 1 and fast.issuperset(layers):
            groups.append(layers)
            fast.difference_update(layers)
    return [*groups, *((layer,) for layer in fast_layers(model).values() if layer in fast)]


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
