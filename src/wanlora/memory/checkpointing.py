"""Blocks that are computed again in backward instead of keeping what they computed.

A runner for `WanTransformer.run_block`. A block that is recomputed keeps its input and nothing else; its forward runs
once more just before its backward, hooks and dropout included (the random state of the first run is restored). A
compiled block may keep the result of attention too, and is then recomputed inside its backward (`saving.py`). Blocks
that are not recomputed keep everything and are faster. The numbers are the same in all cases. Which blocks do what is
for `keep` to say (`keeping.py`); streamed blocks that are not compiled must be recomputed.

The last blocks are let off first: backward needs them first, so what they keep is gone again by the time that others
are recomputed.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wanlora.foundation.log import say_once
from wanlora.memory.compile import chooses_what_to_save
from wanlora.memory.offload import InputOffload
from wanlora.memory.streaming import BlockStream, Check
from wanlora.memory.transfers import transfers_for


class Kept(NamedTuple):
    """What is kept for backward in a pass."""

    blocks: int = 0
    """So many blocks keep what they computed."""
    attention: int = 0
    """So many of the others keep the result of attention, if they can."""
    everything: bool = False
    """Those that keep also keep what could be had again from it for little (`saving.py`)."""


KEEPS_NOTHING = Kept()
Keep = Callable[[Tensor], Kept]
"""The residual stream that enters a block -> what is kept in this pass."""


def keep_none(x: Tensor) -> Kept:
    """Everything is recomputed."""
    return KEEPS_NOTHING


class Recompute:
    """Calls blocks, recomputing those at `indexes` of `blocks` in backward.

    Of these, those that need not be recomputed may be let off by `keep`. `offload` keeps the inputs of recomputed
    blocks on the host (the first argument of each call: the residual stream). Without gradients it is a plain call.
    Counters since the start: `kept` and `recomputed` calls, and those between, `attention_kept`.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        indexes: Literal["all"] | Collection[int] = "all",
        *,
        stream: BlockStream | None = None,
        keep: Keep = keep_none,
        offload: bool = False,
    ) -> None:
        self.blocks = blocks
        self.indexes = tuple(sorted(range(len(blocks)) if indexes == "all" else indexes))
        self.stream = stream
        self.keep = keep
        self.offload = offload
        self.kept = self.recomputed = self.attention_kept = 0
        self._chosen = {id(blocks[index]) for index in self.indexes}
        self._offloads: dict[torch.device, InputOffload] = {}
        self.refresh()

    def refresh(self) -> None:
        """Look again at which blocks are streamed or compiled. Between passes only."""
        self.chooses = all(map(chooses_what_to_save, self.blocks))
        """Whether it can be chosen what blocks save for backward."""
        streamed = self.stream.streamed_indexes if self.stream is not None and not self.chooses else ()
        self.optional = tuple(index for index in self.indexes if index not in streamed)
        """Those that `keep` can let off."""
        self._places = {id(self.blocks[index]): place for place, index in enumerate(reversed(self.optional))}

    def __call__(self, block: nn.Module, x: Tensor, *args: Tensor) -> Tensor:
        """The block's output."""
        if id(block) not in self._chosen or not torch.is_grad_enabled():
            plain: Tensor = block(x, *args)
            return plain
        kept = self.keep(x)
        place = self._places.get(id(block))
        if place is not None and place < kept.blocks:
            self.kept += 1
            with self._watched(block):
                out: Tensor = block(x, *args, save="everything") if kept.everything else block(x, *args)
            return out
        if place is not None and place < kept.blocks + kept.attention:
            self.attention_kept += 1
            with self._offloaded(x, self._check(block)) if self.offload else self._watched(block):
                out = block(x, *args, save="attention")
        else:
            self.recomputed += 1
            with self._offloaded(x):
                out = checkpoint(block, x, *args, use_reentrant=False, preserve_rng_state=True)
        return out

    def _check(self, block: nn.Module) -> Check | None:
        return None if self.stream is None else self.stream.watch(block)

    @contextmanager
    def _watched(self, block: nn.Module) -> Iterator[None]:
        check = self._check(block)
        if check is None:
            yield
            return

        def pack(tensor: Tensor) -> Tensor:
            check(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield

    def _offloaded(self, x: Tensor, check: Check | None = None) -> AbstractContextManager[None]:
        offload = self._offload_for(x.device) if self.offload else None
        return offload.keep(x, check) if offload else nullcontext()

    def _offload_for(self, device: torch.device) -> InputOffload | None:
        if device.type == "cpu":
            say_once("--gradient_checkpointing_cpu_offload has no effect on a CPU: what it would move is there already")
            return None
        if device not in self._offloads:
            self._offloads[device] = InputOffload(device, transfers_for(device))
        return self._offloads[device]
