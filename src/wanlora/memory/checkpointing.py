"""Blocks that are computed again in backward instead of keeping what they computed.

A runner for `WanTransformer.run_block`. A block that is recomputed keeps its input and nothing else; its forward runs
once more just before its backward, hooks and dropout included (the random state of the first run is restored). Blocks
that are not chosen keep everything and are faster. Streamed blocks must be chosen.
"""

from collections.abc import Collection, Sequence
from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wanlora.foundation.log import say_once
from wanlora.memory.offload import InputOffload
from wanlora.memory.transfers import transfers_for


class Recompute:
    """Calls blocks, recomputing those at `indexes` of `blocks` in backward.

    `offload` keeps the inputs of recomputed blocks on the host (the first argument of each call: the residual stream).
    Without gradients it is a plain call.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], indexes: Literal["all"] | Collection[int] = "all", *, offload: bool = False
    ) -> None:
        chosen = range(len(blocks)) if indexes == "all" else indexes
        self.indexes = tuple(sorted(chosen))
        self.offload = offload
        self._chosen = {id(blocks[index]) for index in self.indexes}
        self._offloads: dict[torch.device, InputOffload] = {}

    def __call__(self, block: nn.Module, x: Tensor, *args: Tensor) -> Tensor:
        """The block's output."""
        if id(block) not in self._chosen or not torch.is_grad_enabled():
            plain: Tensor = block(x, *args)
            return plain
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
