"""Which blocks are streamed, and where a tensor rests while a model is loaded.

Streamed blocks lie evenly between resident ones, so that each copy has the same stretch of computation to hide
behind.
"""

from collections.abc import Collection

import torch
from torch import Tensor

from wanlora.foundation.errors import MemoryPlanError
from wanlora.models.wan.checkpoint import install_parameter
from wanlora.models.wan.transformer import WanTransformer


def streamed_indexes(num_blocks: int, num_streamed: int) -> tuple[int, ...]:
    """The blocks to stream, ascending and evenly spaced. Raises `MemoryPlanError` if there are not that many."""
    if not 0 <= num_streamed <= num_blocks:
        raise MemoryPlanError(
            f"{num_streamed} blocks are to be streamed, but this model has {num_blocks}; "
            f"give --blocks_to_swap a number from 0 to {num_blocks}"
        )
    return tuple((2 * place + 1) * num_blocks // (2 * num_streamed) for place in range(num_streamed))


class RestingPlace:
    """Where a tensor is kept after loading: those of streamed blocks on the host, the rest on `device`."""

    def __init__(self, device: torch.device, streamed: Collection[int] = ()) -> None:
        self.device = device
        self._on_host = tuple(f"blocks.{index}." for index in streamed)

    def __call__(self, name: str) -> torch.device:
        """Where the tensor with this official name goes."""
        return torch.device("cpu") if name.startswith(self._on_host) else self.device

    def install(self, model: WanTransformer, name: str, tensor: Tensor, scale: Tensor | None) -> None:
        """The `install` hook of `load_transformer` that does nothing but put tensors in their place."""
        resting = self(name)
        install_parameter(model, name, tensor.to(resting), None if scale is None else scale.to(resting))
