"""How far fp8 maths are from ordinary maths on the same weights, measured on a model at work.

Two questions. Which layers err: every layer's output is computed both ways from the input that it gets, so an error is
its own and not what came down to it. What training would notice: the loss of the whole model, and the direction of the
gradient of everything that is trained.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from wanlora.quantization.fast_linear import FastFp8Linear, wide_maths
from wanlora.quantization.scaled_matmul import Kernel

_NO_BACKWARD = -1
"""torch's number of the backward pass in which a call happens, if it happens in none."""


class LayerErrors:
    """Collects the relative errors of `layers` over any number of passes; use as a context manager.

    A pass may run in fp8 maths or in ordinary ones (`wide_maths`): what a layer answers is held against what it would
    answer in the other, from the same input. Calls in backward, where blocks are recomputed, do not count.
    """

    def __init__(self, layers: Mapping[str, FastFp8Linear]) -> None:
        self.layers = layers
        self._kernels = {name: layer.kernel for name, layer in layers.items()}
        self._squares: dict[str, Tensor] = {}

    def __enter__(self) -> "LayerErrors":
        self._hooks = [
            layer.register_forward_hook(self._hook(name), prepend=True) for name, layer in self.layers.items()
        ]
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def result(self) -> dict[str, float]:
        """Norm of the error over norm of the output, of each layer that was called. Waits for the device."""
        if not self._squares:
            return {}
        errors, norms = torch.stack(list(self._squares.values())).cpu().double().unbind(1)
        ratios = (errors / norms.clamp(min=torch.finfo(torch.float32).tiny)).sqrt()
        return dict(zip(self._squares, ratios.tolist(), strict=True))

    def _hook(self, name: str) -> Callable[[FastFp8Linear, tuple[Tensor], Tensor], None]:
        def compare(layer: FastFp8Linear, args: tuple[Tensor], out: Tensor) -> None:
            if torch._C._current_graph_task_id() != _NO_BACKWARD:
                return
            wide = layer.kernel is None
            with torch.no_grad(), _computing_by(layer, self._kernels[name] if wide else None):
                other = layer.forward(args[0])
            exact, fast = (out.detach(), other) if wide else (other, out.detach())
            squares = torch.stack([(fast.float() - exact.float()).square().sum(), exact.float().square().sum()])
            self._squares[name] = self._squares[name] + squares if name in self._squares else squares

        return compare


@contextmanager
def _computing_by(layer: FastFp8Linear, kernel: Kernel | None) -> Iterator[None]:
    before, layer.kernel = layer.kernel, kernel
    try:
        yield
    finally:
        layer.kernel = before


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """What fp8 maths change for training."""

    loss: float
    exact_loss: float
    """With ordinary maths."""
    cosine: float
    """Between the two gradients of all that is trained; 1 is the same direction."""

    @property
    def loss_error(self) -> float:
        """Relative, with its sign."""
        return (self.loss - self.exact_loss) / self.exact_loss


def compare_maths(
    loss: Callable[[], Tensor],
    parameters: Sequence[Tensor],
    layers: Mapping[str, FastFp8Linear],
    errors: LayerErrors | None = None,
) -> Difference:
    """Loss and gradient with fp8 maths and without. `loss` must repeat itself; no `.grad` is touched.

    `errors` collects during the pass without them, in which every layer gets the input that it would get if there were
    none at all.
    """
    with wide_maths(layers.values()), errors or nullcontext():
        exact_loss, exact = _gradient(loss, parameters)
    fast_loss, fast = _gradient(loss, parameters)
    values = torch.stack([fast_loss, exact_loss, cosine(fast, exact)]).tolist()
    return Difference(loss=values[0], exact_loss=values[1], cosine=values[2])


def cosine(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """Between two lists of tensors, each taken as one long vector; float32, on their device. 0 if one of them is 0."""
    product = torch.stack([(a * b).sum() for a, b in zip(one, other, strict=True)]).sum()
    norms = [torch.stack([tensor.square().sum() for tensor in tensors]).sum().sqrt() for tensors in (one, other)]
    # Squares of small gradients are far below float32's smallest number only where the gradient is 0.
    return product / (norms[0] * norms[1]).clamp(min=torch.finfo(torch.float32).tiny)


def _gradient(loss: Callable[[], Tensor], parameters: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    value = loss()
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    return value.detach(), [
        torch.zeros_like(parameter) if gradient is None else gradient
        for parameter, gradient in zip(parameters, found, strict=True)
    ]
