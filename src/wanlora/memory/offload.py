"""Block inputs kept on the host between forward and backward.

What recomputation keeps of each block is its input, the residual stream: L x D numbers a block, 6 GB for 40 blocks of
a 14B model at 7,500 tokens in float32. Here they go to page-locked host memory on a side stream while the next block
computes, and come back one block ahead of need, so the card holds about two of them. Everything else that blocks
share (time, text, rope tables) stays: it exists once. Host buffers are reused from step to step.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from wanlora.memory.pinned import pinned_buffer, unpin
from wanlora.memory.transfers import Mark, Transfers


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
        self.returning: tuple[Tensor, Mark] | None = None
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
        kept = _Kept(tensor, self.buffers, self._last)
        self.transfers.copy(kept.on_host(), tensor.detach(), after=self.transfers.mark())
        self.transfers.hold(tensor)
        self._last = weakref.ref(kept)
        return kept

    def _unpack(self, packed: "Tensor | _Kept") -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        tensor, arrived = packed.returning or self._fetch(packed)
        packed.returning = None
        before = packed.previous() if packed.previous else None
        if before is not None and before.returning is None:
            before.returning = self._fetch(before)
        self.transfers.wait(arrived)
        return tensor

    def _fetch(self, kept: _Kept) -> tuple[Tensor, Mark]:
        """Queue the way back. The mark keeps it behind whatever used the new tensor's memory before."""
        tensor = torch.empty(kept.shape, dtype=kept.dtype, device=kept.device)
        arrived = self.transfers.copy(tensor, kept.on_host(), after=self.transfers.mark())
        self.transfers.hold(tensor)
        return tensor, arrived
