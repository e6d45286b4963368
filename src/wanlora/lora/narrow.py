"""The factors in the number format of the products, made once a step.

Factors are float32, products are not. Cast where they are used, they are one small kernel a layer in forward and two in
backward for their gradients: almost a third of the kernels of a compiled block, and in small sizes the card waits for
the host that queues kernels. So all factors lie in a second vector in the narrow format, which one or a few kernels
fill before the passes of a step; blocks read its parts, and backward leaves narrow gradients there, which are widened
together later. The numbers are the same to the bit: each factor is multiplied in float32 and rounded once, each
gradient is widened and then multiplied.

A copy that lags behind its original cannot be read: adapters have the copies within `lent` only, which makes them anew
when it begins, and nothing changes factors during a step's passes. Whoever computes at any other time (validation,
previews, the check of fp8 maths) gets the float32 factors, cast as they are used.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from wanlora.lora.network import LoRANetwork


class NarrowFactors:
    """Copies of factors in one vector, which stays where it is; `leaves` are its parts, in the factors' shapes.

    Within `lent` the adapters compute with the leaves, and backward leaves its gradients there.
    """

    def __init__(
        self, network: LoRANetwork, parameters: Sequence[nn.Parameter], wide: Tensor, dtype: torch.dtype
    ) -> None:
        """`parameters` are factors of `network`, and in this order views of `wide`, [numbers] float32."""
        self.wide = wide.detach()
        self.vector = torch.empty_like(self.wide, dtype=dtype)
        self.leaves = [nn.Parameter(part) for part in parts_of(self.vector, parameters)]
        adapters = network.adapters.values()
        factors = {id(factor.weight): factor for by in adapters for factor in (by.lora_down, by.lora_up)}
        multiplied = {id(by.lora_up.weight): by for by in adapters}
        places = [id(parameter) for parameter in parameters]
        self._factors = [factors[place] for place in places]
        self._ups = [(index, multiplied[place]) for index, place in enumerate(places) if place in multiplied]

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Within the block the adapters compute with copies of the factors as they are when it begins."""
        self._refresh()
        for factor, leaf in zip(self._factors, self.leaves, strict=True):
            factor.lend(leaf)
        try:
            yield
        finally:
            for factor in self._factors:
                factor.lend(None)

    def strengthen(self, gradient: Tensor) -> None:
        """Make the gradient of the factors of that of the leaves, [numbers] float32, in place."""
        self._multiply(gradient, self._strengths())

    def _refresh(self) -> None:
        wide, strengths = self.wide, self._strengths()
        if strengths:
            wide = wide.clone()
            self._multiply(wide, strengths)
        self.vector.copy_(wide)

    def _strengths(self) -> dict[int, float]:
        """What up factors are multiplied by, by their place, where it is not 1."""
        return {index: strength for index, by in self._ups if (strength := by.strength) != 1}

    def _multiply(self, vector: Tensor, strengths: Mapping[int, float]) -> None:
        if strengths:
            parts = list(parts_of(vector, self.leaves))
            torch._foreach_mul_([parts[index] for index in strengths], list(strengths.values()))


def parts_of(vector: Tensor, like: Sequence[Tensor]) -> Iterator[Tensor]:
    """Views of a vector, [numbers], one behind the other, in the shapes of `like`."""
    for tensor, part in zip(like, vector.split([tensor.numel() for tensor in like]), strict=True):
        yield part.view_as(tensor)
