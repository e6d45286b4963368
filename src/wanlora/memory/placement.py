"""Which blocks are streamed, and how they get to the host while a model is loaded.

Streamed blocks lie evenly between resident ones, so that each copy has the same stretch of computation to hide
behind.
"""

import re
from collections.abc import Collection

import torch
from torch import Tensor, nn

from wanlora.foundation.errors import MemoryPlanError
from wanlora.memory.masters import BlockMaster, frozen_tensors
from wanlora.memory.pinned import unpin
from wanlora.models.wan.checkpoint import Install
from wanlora.models.wan.transformer import WanTransformer

_AT_A_TIME = 2
"""So many incomplete blocks are held on the device."""
_OF_A_BLOCK = re.compile(r"blocks\.(\d+)\.")


def streamed_indexes(num_blocks: int, num_streamed: int) -> tuple[int, ...]:
    """The blocks to stream, ascending and evenly spaced. Raises `MemoryPlanError` if there are not that many."""
    if not 0 <= num_streamed <= num_blocks:
        raise MemoryPlanError(
            f"{num_streamed} blocks are to be streamed, but this model has {num_blocks}; "
            f"give --blocks_to_swap a number from 0 to {num_blocks}"
        )
    return tuple((2 * place + 1) * num_blocks // (2 * num_streamed) for place in range(num_streamed))


class LeavingBlocks:
    """Sends each streamed block of a model that is being read to the host as soon as it is complete.

    A block is copied once, from the device into its page-locked master, and the device holds one or two of them at a
    time. In a file that has its tensors in another order, so that parts of many blocks would be there, those parts wait
    on the host. `masters` are those of the blocks that have left, by index.
    """

    def __init__(self, device: torch.device, streamed: Collection[int]) -> None:
        self.device = device
        self.streamed = frozenset(streamed)
        self.masters: dict[int, BlockMaster] = {}
        self._begun: set[int] = set()

    def after(self, install: Install) -> Install:
        """`install` of `load_transformer`, which puts tensors on the device; behind its last tensor a block leaves."""

        def install_and_leave(model: WanTransformer, name: str, tensor: Tensor, scale: Tensor | None) -> None:
            install(model, name, tensor, scale)
            index = _block_index(name)
            if index in self.streamed:
                self._look_at(index, model.blocks[index])

        return install_and_leave

    def _look_at(self, index: int, block: nn.Module) -> None:
        """A tensor of a streamed block has been installed."""
        self._begun.add(index)
        if _is_complete(block):
            self.masters[index] = BlockMaster(block, device=self.device)
            self._begun.remove(index)
        elif len(self._begun) > _AT_A_TIME:
            _send_to_host(block)

    def forget(self) -> None:
        """The model is not used after all: its masters give their memory back."""
        for master in self.masters.values():
            unpin(master.flat)
        self.masters.clear()
        self._begun.clear()


def _block_index(name: str) -> int:
    """Of the block that the tensor with this official name belongs to, -1 for none."""
    found = _OF_A_BLOCK.match(name)
    return int(found[1]) if found else -1


def _send_to_host(block: nn.Module) -> None:
    for tensor in frozen_tensors(block):
        if not tensor.is_meta:
            tensor.data = tensor.data.cpu()


def _is_complete(block: nn.Module) -> bool:
    return not any(tensor.is_meta for tensor in (*block.parameters(), *block.buffers()))
