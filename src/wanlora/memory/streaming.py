"""Blocks that live on the host and pass through the card.

The base model is frozen, so a block is never copied back: each streamed block has one page-locked master on the host,
and a small ring of device buffers takes turns holding the blocks that are needed next. A copy is queued ahead of use
on a side stream, in one piece, while other blocks compute. Events keep order: a block waits for its copy, and a
buffer is refilled only once the block that used it has computed. The host waits for nothing.

What is needed next is foretold from the order in which blocks are called. A forward pass goes up; backward recomputes
from the top down, so the ring keeps its contents at the turn and starts the way back with a hit; below block 0 the
next step's forward begins. Without gradients (previews, validation) forward follows forward. A wrong guess costs a
copy and never a wrong result. With S streamed blocks and a ring of R, a training step makes 2 (S - R) copies; with a
ring for all of them none, so the ring may grow and shrink from step to step (`residency.py`). It may also grow within a
backward pass by what that frees (`refilling.py`), so that more blocks are there when the next forward begins, and
shrink within that forward, block by block, while what backward needs comes to be.

Backward announces each block too, so its weights are there whether it is recomputed or has kept what it computed. But
what autograd has saved of a streamed block may be its weights themselves, which are looked up where they are by then,
and no view of them: that would show a buffer that has since been refilled. Blocks of plain autograd save such views and
must be recomputed (`checkpointing.py`); compiled ones do not, which `watch` makes sure of. The model knows nothing of
all this: hooks around each block do it, and they fire in recomputation too.

Order of use: load (streamed blocks leave for the host, see `placement.py`), quantise, freeze, adapt, `attach`, compile.
Weights must not be moved or replaced between `attach` and `detach`; adapters, which are trained, stay on the device
untouched.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from wanlora.foundation.errors import MemoryPlanError
from wanlora.foundation.log import warn_once
from wanlora.memory.masters import BlockMaster
from wanlora.memory.measure import is_out_of_memory
from wanlora.memory.pinned import is_page_locked
from wanlora.memory.placement import streamed_indexes
from wanlora.memory.refilling import FreedMemory
from wanlora.memory.transfers import Mark, Transfers, transfers_for

Check = Callable[[Tensor], None]
"""Looks at a tensor that autograd saves."""


def needed_next(streamed: Sequence[int], index: int, *, rising: bool, turns: bool, count: int) -> list[int]:
    """The first `count` streamed blocks to be used from block `index` on, the soonest first.

    `rising`: blocks are being called in ascending order. `turns`: the top is followed by the way back (training) and
    not by another forward.
    """
    if rising or not turns:
        ahead = [block for block in streamed if block >= index]
        after = list(reversed(streamed)) if turns else list(streamed)
    else:
        ahead = [block for block in reversed(streamed) if block <= index]
        after = list(streamed)
    return list(dict.fromkeys([*ahead, *after]))[:count]


class _Announced(torch.autograd.Function):
    """Passes a block's output on, and says so before that block's backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, announce: Callable[[], None]) -> Tensor:
        ctx.announce = announce
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.announce()
        return grad, None


class _Slot:
    """A device buffer and what it holds."""

    def __init__(self, buffer: Tensor) -> None:
        self.buffer = buffer
        self.block: int | None = None
        self.filled: Mark = None
        self.free: Mark = None
        self._views: dict[int, list[Tensor]] = {}

    def views(self, index: int, master: BlockMaster) -> list[Tensor]:
        """Tensors of block `index` in the buffer. Making them takes the host a while, so they are kept."""
        if index not in self._views:
            self._views[index] = master.views(self.buffer)
        return self._views[index]


class BlockStream:
    """Streams `num_streamed` of `blocks` to `device`.

    `streamed_indexes` names them; `base_ring` device buffers are theirs until `resize`. Counters since the start:
    `copies` and `copied_bytes` host to device, `waits` uses of a streamed block that follow one of another, `misses`
    uses whose copy had not even been queued. Raises `MemoryPlanError` if there are fewer blocks than `num_streamed`.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        num_streamed: int,
        device: torch.device,
        ring_size: int = 2,
        pin: bool = True,
        masters: Mapping[int, BlockMaster] | None = None,
    ) -> None:
        """`masters` are those of blocks that are on the host already, by index."""
        self.blocks = blocks
        self.streamed_indexes = streamed_indexes(len(blocks), num_streamed)
        self.device = device
        self.base_ring = max(ring_size, 1)
        self.pin = pin
        self.copies = self.copied_bytes = self.waits = self.misses = 0
        self._transfers: Transfers = transfers_for(device)
        self._masters: dict[int, BlockMaster] = {}
        self._ready = dict(masters or {})
        self._ring: list[_Slot] = []
        self._hooks: list[RemovableHandle] = []
        self._checks: dict[int, Check] = {}
        self._memory: set[int] = set()
        """Where the buffers begin."""
        self._slot_bytes = 0
        self.lasting = 0
        """Buffers that are there when the next forward ends; what there is beyond them goes until then."""
        self._passing = 0
        """Bytes that are theirs when that forward begins, less with every block."""
        self._in_use: _Slot | None = None
        self._last_index = -1
        self._rising = True
        self._freed: FreedMemory | None = None
        self._most, self._may_grow = 0, True
        if 0 < num_streamed <= ring_size:
            warn_once(
                f"{num_streamed} streamed blocks and a ring of {ring_size} device buffers: this saves no memory; "
                f"stream more than {ring_size} blocks"
            )

    @property
    def attached(self) -> bool:
        """Whether blocks are being streamed now."""
        return bool(self._hooks)

    @property
    def ring_size(self) -> int:
        """Device buffers now; never more than there are streamed blocks."""
        return len(self._ring)

    @property
    def num_resident(self) -> int:
        """Blocks that stay on the device."""
        return len(self.blocks) - len(self.streamed_indexes)

    @property
    def page_locked(self) -> bool:
        """Whether every master is page-locked, so that copies run beside the computation."""
        return all(is_page_locked(master.flat) for master in self._masters.values())

    def attach(self) -> None:
        """Move streamed blocks to the host and all else of the blocks to the device, then begin to stream.

        Blocks may be anywhere before; one at a time is moved, so the device never holds more than it did.
        """
        if self.attached:
            raise RuntimeError("the blocks are being streamed already")
        for index, block in enumerate(self.blocks):
            if index in self.streamed_indexes:
                ready = self._ready.pop(index, None)
                self._masters[index] = ready or BlockMaster(block, device=self.device, pin=self.pin)
                kept = {id(tensor) for tensor in self._masters[index].tensors}
            else:
                kept = set()
            _move(block, self.device, without=kept)
        self._start()

    def stream_more(self, count: int) -> int:
        """Stream `count` blocks more, or all that are left, evenly among the resident ones; how many.

        Between passes only; the ring is `base_ring` afterwards. Frees their memory on the device; where nothing was
        streamed yet, less the ring's.
        """
        resident = [index for index in range(len(self.blocks)) if index not in self.streamed_indexes]
        new = [resident[place] for place in streamed_indexes(len(resident), min(count, len(resident)))]
        self._stop()
        for index in new:
            self._masters[index] = BlockMaster(self.blocks[index], device=self.device, pin=self.pin)
        self.streamed_indexes = tuple(sorted((*self.streamed_indexes, *new)))
        self._start()
        return len(new)

    @property
    def passing_bytes(self) -> int:
        """Bytes of buffers that the next forward gives back, block by block."""
        return (self.ring_size - self.lasting) * self._slot_bytes

    def resize(self, count: int, *, passing: int = 0) -> None:
        """Let the streamed blocks share `count` device buffers from now on, or one each if there are fewer blocks.

        Of those that are there beyond that, `passing` bytes stay for now: so much memory is theirs when the next
        forward begins, less with every block and none at its end, and it gives them back one by one on its way. Between
        passes only. Blocks that are needed soonest stay where they are. The host waits for nothing. Raises torch's
        error if memory does not suffice; the ring has then as many more as it did for.
        """
        self._freed = None
        self.lasting = min(max(count, 1), len(self._masters))
        self._passing = passing
        count = min(max(self.ring_size, self.lasting), self.lasting + passing // max(self._slot_bytes, 1))
        if count != self.ring_size:
            self.reset()
            self._shrink(count, self.streamed_indexes)  # the next pass begins below
        while self.ring_size < count:
            self._make_slot()

    def _shrink(self, count: int, needed: Sequence[int]) -> None:
        """Give buffers back until there are `count`: of blocks that are not `needed`, or last."""
        places = {index: place for place, index in enumerate(needed)}
        self._ring.sort(key=lambda slot: len(places) if slot.block is None else places.get(slot.block, len(places)))
        while self.ring_size > count:
            self._drop(self._ring.pop())

    def _let_pass(self, index: int, *, turns: bool) -> None:
        """Before block `index` on the way up: give back the buffers for which there is memory no longer."""
        top = max(len(self.blocks) - 1, 1)
        count = self.lasting + self._passing * (top - index) // top // max(self._slot_bytes, 1)
        if self._rising and self.ring_size > count:
            self._shrink(count, needed_next(self.streamed_indexes, index, rising=True, turns=turns, count=count))

    def grow(self, most: int, freed: FreedMemory) -> None:
        """Let the ring grow up to `most` buffers in the next backward pass, by what is `freed`, until `resize`."""
        if self._may_grow:
            self._most, self._freed = min(most, len(self._masters)), freed

    def _take_freed(self, index: int) -> None:
        """Before the backward of block `index`: make buffers of what has been freed."""
        if self._freed is None or self.ring_size >= self._most:
            return
        if index == len(self.blocks) - 1:
            self._freed.begin()
        try:
            for _ in range(min(self._freed.spare() // self._slot_bytes, self._most - self.ring_size)):
                self._make_slot()
                self._freed.take(self._slot_bytes)
                self.lasting = self.ring_size
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self._freed, self._may_grow = None, False
            warn_once(
                "what backward frees is in pieces too small for a swapped block: blocks that stay on the card for "
                "small batches are copied in their forward, which takes longer"
            )

    def _drop(self, slot: _Slot) -> None:
        """Let the buffer of `slot` be used for something else, once its last copy is there."""
        self._memory.discard(slot.buffer.untyped_storage().data_ptr())
        self._transfers.wait(slot.filled)
        self._look_at_host(slot)

    def _look_at_host(self, slot: _Slot) -> None:
        """What is in a slot is there no longer."""
        if slot.block is not None:
            former = self._masters[slot.block]
            former.point_to(former.on_host)

    def _start(self) -> None:
        """Make the ring and watch the blocks; nothing without streamed blocks."""
        if not self._masters:
            return
        self._slot_bytes = max(master.num_bytes for master in self._masters.values())
        self._checks = {
            id(self.blocks[index]): partial(_check_view, self._memory, frozenset(map(id, master.tensors)))
            for index, master in self._masters.items()
        }
        self.resize(self.base_ring)
        for index, block in enumerate(self.blocks):
            self._hooks.append(block.register_forward_pre_hook(partial(self._before_call, index), prepend=True))
            self._hooks.append(block.register_forward_hook(partial(self._after_call, index)))

    def _stop(self) -> None:
        """Undo `_start`: streamed blocks look at their masters."""
        self.reset()
        for hook in self._hooks:
            hook.remove()
        self._transfers.finish()
        for master in self._masters.values():
            master.point_to(master.on_host)
        self._hooks, self._ring, self._checks = [], [], {}
        self._memory.clear()
        self.lasting = self._passing = 0

    def detach(self, device: torch.device | None = None) -> None:
        """Stop streaming and leave all weights on `device` (the stream's own unless another is named)."""
        self._stop()
        for master in self._masters.values():
            master.dissolve(device or self.device)
        self._masters = {}

    def reset(self) -> None:
        """Forget where in a pass we are. For after an exception in the middle of one; what is in the ring stays."""
        self._release()
        self._last_index, self._rising = -1, True

    def _make_slot(self) -> None:
        slot = _Slot(torch.empty(self._slot_bytes, dtype=torch.uint8, device=self.device))
        slot.free = self._transfers.mark()  # the memory may still be read by what had it before
        self._memory.add(slot.buffer.untyped_storage().data_ptr())
        self._ring.append(slot)

    def watch(self, block: nn.Module) -> Check | None:
        """Looks at what autograd saves of `block`: raises `MemoryPlanError` for a view of its weights.

        None if the block stays on the device: it may save what it likes.
        """
        return self._checks.get(id(block))

    def _before_call(self, index: int, block: nn.Module, args: tuple[Any, ...]) -> None:
        self._prepare(index, turns=torch.is_grad_enabled())

    def _after_call(self, index: int, block: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        """The block's output, whose backward begins with that block's weights."""
        announced: Tensor = _Announced.apply(out, partial(self._before_backward, index)) if out.requires_grad else out
        return announced

    def _before_backward(self, index: int) -> None:
        self._take_freed(index)
        self._prepare(index, turns=True)

    def _prepare(self, index: int, *, turns: bool) -> None:
        """Make block `index` ready and queue the copies of those that follow; `turns` is `needed_next`'s."""
        if self._in_use is not None and self._in_use.block == index:
            return
        self._release()
        if index != self._last_index:
            self._rising, self._last_index = index > self._last_index, index
            self._let_pass(index, turns=turns)
        needed = needed_next(self.streamed_indexes, index, rising=self._rising, turns=turns, count=self.ring_size)
        held = {slot.block for slot in self._ring}
        self.misses += index in self._masters and index not in held
        for wanted in needed:
            if wanted not in held:
                self._load(wanted, needed)
        if index in self._masters:
            self._use(index)

    def _release(self) -> None:
        """Everything that read the buffer in use has been queued by now: it may be refilled after that."""
        if self._in_use is not None:
            self._in_use.free = self._transfers.mark()
            self._in_use = None

    def _load(self, index: int, needed: Collection[int]) -> None:
        """Queue the copy of a block into a buffer whose block is not needed soon."""
        slot = next(slot for slot in self._ring if slot.block not in needed)
        self._look_at_host(slot)
        master = self._masters[index]
        slot.filled = self._transfers.copy(slot.buffer[: master.num_bytes], master.flat, after=slot.free)
        slot.block = index
        self.copies += 1
        self.copied_bytes += master.num_bytes

    def _use(self, index: int) -> None:
        """Let the computation wait for the copy of a block and look at it."""
        slot = next(slot for slot in self._ring if slot.block == index)
        self._transfers.wait(slot.filled)
        master = self._masters[index]
        master.point_to(slot.views(index, master))
        self._in_use = slot
        self.waits += 1


def _check_view(memory: Collection[int], weights: Collection[int], tensor: Tensor) -> None:
    """Raise `MemoryPlanError` if `tensor` shows `memory` and is none of the `weights` themselves (their ids)."""
    if tensor.untyped_storage().data_ptr() in memory and id(tensor) not in weights:
        raise MemoryPlanError(
            "a block whose weights are swapped was to keep a view of them for backward, which would show other "
            "weights by then; use --gradient_checkpointing --activation_memory off"
        )


def _move(block: nn.Module, device: torch.device, *, without: Collection[int]) -> None:
    """Move a block's tensors to `device` in place, but not those with these ids."""
    for tensor in [*block.parameters(), *block.buffers()]:
        if id(tensor) not in without:
            tensor.data = tensor.data.to(device)
