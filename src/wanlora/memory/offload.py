"""Block inputs kept on the host between forward and backward.

What recomputation keeps of each block is its input, the residual stream: L x D numbers a block, 6 GB for 40 blocks of
a 14B model at 7,500 tokens in float32. Here they go to page-locked host memory on a side stream while the next block
computes, and come back one block ahead of need, so the card holds about two of them. Everything else that blocks
share (time, text, rope tables) stays: it exists once. Host buffers are reused from step to step.

The host may be far ahead of the card, so a tensor that is being copied is held here until computation has been told to
wait for its copy; its memory is then used anew in the order of the computation, and not when the host happens to look.
"""

import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from wanlora.memory.pinned import pinned_buffer, unpin
from wanlora.memory.transfers import Mark, Transfers

_ON_THEIR_WAY = 2
"""So many inputs may be leaving the card at a time."""


class HostBuffers:
    """Page-locked buffers for reuse. All copies to and from them run in one queue, which keeps reuse in order."""

    def __init__(self, device: torch.device, transfers: Transfers) -> None:
        self.device = device
        self.transfers = transfers
        self.free: list[Tensor] = []
        self.num_bytes = 0

    def take(self, num_bytes: int) -> Tensor:
        """The smallest free buffer that is large enough, or a new one in place of one that is too small."""
        fitting = [place for place, buffer in enumerate(self.free) if buffer.numel() >= num_bytes]
        if fitting:
            return self.free.pop(min(fitting, key=lambda place: self.free[place].numel()))
        if self.free:
            self._discard(self.free.pop())
        self.num_bytes += num_bytes
        return pinned_buffer(num_bytes, device=self.device)

    def give(self, buffer: Tensor) -> None:
        """Take a buffer back."""
        self.free.append(buffer)

    def _discard(self, buffer: Tensor) -> None:
        self.transfers.finish()
        unpin(buffer)
        self.num_bytes -= buffer.numel()


class _Kept:
    """A tensor that is on the host. Its buffer is free again when autograd lets go of it."""

    def __init__(self, tensor: Tensor, buffers: HostBuffers, previous: "weakref.ref[_Kept] | None") -> None:
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device
        self.previous = previous
        self.flat = buffers.take(tensor.numel() * tensor.element_size())
        weakref.finalize(self, buffers.give, self.flat)

    def on_host(self) -> Tensor:
        """The tensor's place on the host."""
        num_bytes = self.shape.numel() * self.dtype.itemsize
        return self.flat[:num_bytes].view(self.dtype).view(self.shape)


class InputOffload:
    """Keeps what autograd saves of chosen tensors on the host."""

    def __init__(self, device: torch.device, transfers: Transfers) -> None:
        self.transfers = transfers
        self.buffers = HostBuffers(device, transfers)
        self._last: weakref.ref[_Kept] | None = None
        self._leaving: deque[tuple[Tensor, Mark]] = deque()
        """Inputs and the marks behind which they have been copied."""
        self._coming: dict[int, tuple[Tensor, Mark]] = {}
        """The same for those on their way back, by what they belong to."""

    @contextmanager
    def keep(self, chosen: Tensor, check: Callable[[Tensor], None] | None = None) -> Iterator[None]:
        """Inside, `chosen` is saved for backward on the host; other tensors are saved as ever, once `check` has seen
        them: of hooks within hooks only the inner ones are called."""
        address, shape = chosen.data_ptr(), chosen.shape
        del chosen  # autograd keeps `pack` as long as what it packed, so it must not hold the tensor

        def pack(tensor: Tensor) -> "Tensor | _Kept":
            same = tensor.data_ptr() == address and tensor.shape == shape
            if same:
                return self._send(tensor)
            if check is not None:
                check(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, self._unpack):
            yield

    def _send(self, tensor: Tensor) -> _Kept:
        self._settle()
        kept = _Kept(tensor, self.buffers, self._last)
        left = self.transfers.copy(kept.on_host(), tensor.detach(), after=self.transfers.mark())
        self._leaving.append((tensor.detach(), left))
        self._let_go(_ON_THEIR_WAY)
        self._last = weakref.ref(kept)
        return kept

    def _unpack(self, packed: "Tensor | _Kept") -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        self._let_go(0)
        was_asked_for = id(packed) in self._coming
        tensor, arrived = self._coming.pop(id(packed)) if was_asked_for else self._fetch(packed)
        before = packed.previous() if packed.previous else None
        if before is not None and id(before) not in self._coming:
            self._coming[id(before)] = self._fetch(before)
        self.transfers.wait(arrived)
        return tensor

    def _fetch(self, kept: _Kept) -> tuple[Tensor, Mark]:
        """Queue the way back. The mark keeps it behind whatever used the new tensor's memory before."""
        tensor = torch.empty(kept.shape, dtype=kept.dtype, device=kept.device)
        return tensor, self.transfers.copy(tensor, kept.on_host(), after=self.transfers.mark())

    def _let_go(self, number: int) -> None:
        """Let computation wait for the oldest copies to the host until only `number` are on their way."""
        while len(self._leaving) > number:
            self.transfers.wait(self._leaving[0][1])
            self._leaving.popleft()

    def _settle(self) -> None:
        """Let computation wait for what a pass that failed had asked for and never used."""
        for _, arrived in self._coming.values():
            self.transfers.wait(arrived)
        self._coming.clear()
