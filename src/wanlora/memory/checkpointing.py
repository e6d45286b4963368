"""Blocks that are computed again in backward instead of keeping what they computed.

A runner for `WanTransformer.run_block`. A block that is recomputed keeps its input and nothing else; its forward runs
once more just before its backward, hooks and dropout included (the random state of the first run is restored). Blocks
that are not chosen keep everything and are faster, and the numbers are the same. Streamed blocks must be recomputed; of
the others `keep` may let as many off as the memory holds (`keeping.py`).

The last blocks are let off first: backward needs them first, so what they keep is gone again by the time that others
are recomputed.
"""

from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wanlora.foundation.log import say_once
from wanlora.memory.offload import InputOffload
from wanlora.memory.transfers import transfers_for

Keep = Callable[[Tensor], int]
"""The residual stream that enters a block -> how many of the blocks that may keep what they computed do so."""


def keep_none(x: Tensor) -> int:
    """Everything is recomputed."""
    return 0


class Recompute:
    """Calls blocks, recomputing those at `indexes` of `blocks` in backward.

    Of these, all but the `required` ones may be let off by `keep`. `offload` keeps the inputs of recomputed blocks on
    the host (the first argument of each call: the residual stream). Without gradients it is a plain call. Counters
    since the start: `kept` and `recomputed` calls.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        indexes: Literal["all"] | Collection[int] = "all",
        *,
        required: Collection[int] = (),
        keep: Keep = keep_none,
        offload: bool = False,
    ) -> None:
        self.blocks = blocks
        self.indexes = tuple(sorted(range(len(blocks)) if indexes == "all" else indexes))
        self.keep = keep
        self.offload = offload
        self.kept = self.recomputed = 0
        self._chosen = {id(blocks[index]) for index in self.indexes}
        self._offloads: dict[torch.device, InputOffload] = {}
        self.require(required)

    def require(self, indexes: Collection[int]) -> None:
        """From now on these blocks are recomputed whatever `keep` says. Between passes only."""
        self.optional = tuple(index for index in self.indexes if index not in indexes)
        """Those that `keep` can let off."""
        self._places = {id(self.blocks[index]): place for place, index in enumerate(reversed(self.optional))}

    def __call__(self, block: nn.Module, x: Tensor, *args: Tensor) -> Tensor:
        """The block's output."""
        if id(block) not in self._chosen or not torch.is_grad_enabled():
            plain: Tensor = block(x, *args)
            return plain
        place = self._places.get(id(block))
        if place is not None and place < self.keep(x):
            self.kept += 1
            kept: Tensor = block(x, *args)
            return kept
        self.recomputed += 1
        offload = self._offload_for(x.device) if self.offload else None
        with offload.keep(x) if offload else nullcontext():
            out: Tensor = checkpoint(block, x, *args, use_reentrant=False, preserve_rng_state=True)
        return out

    def _offload_for(self, device: torch.device) -> InputOffload | None:
        if device.type == "cpu":
            say_once("--gradient_checkpointing_cpu_offload has no effect on a CPU: what it would move is there already")
            return None
        if device not in self._offloads:
            self._offloads[device] = InputOffload(device, transfers_for(device))
        return self._offloads[device]
