"""Bringing many tensors to a file, wherever they are, as fast as the file takes them.

To fetch a tensor of a card into memory of its own and then write it makes file and bus wait for each other, and memory
that is new for each tensor costs more than the copy. Here the bytes of the card's tensors pass through two page-locked
buffers as one stream, small tensors together and large ones in pieces: while one buffer is written the other is filled.
Tensors on the host are written from where they are.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

_PIECE = 32 << 20
_BUFFERS = 2


def host_views(tensors: Iterable[Tensor]) -> Iterator[memoryview]:
    """The bytes of `tensors` in their order, in host memory. A view holds until the next one is asked for."""
    filled: deque[_Buffer] = deque()
    free: list[_Buffer] = []
    for tensor in tensors:
        flat = tensor.detach().contiguous().flatten().view(torch.uint8)
        if _on_host(flat):
            yield from _emptied(filled, free, 0)
            yield flat.numpy().data
            continue
        while len(flat):
            if not filled or filled[-1].room == 0:
                yield from _emptied(filled, free, _BUFFERS - 1)
                filled.append(free.pop() if free else _Buffer(flat.device))
            flat = filled[-1].take(flat)
    yield from _emptied(filled, free, 0)


class _Buffer:
    """Page-locked memory that a card fills."""

    def __init__(self, device: torch.device) -> None:
        self._memory = torch.empty(_PIECE, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._used = 0
        self._sent: Any = None

    @property
    def room(self) -> int:
        """Bytes that are not used."""
        return len(self._memory) - self._used

    def take(self, flat: Tensor) -> Tensor:
        """Queue a copy of as much of `flat` as there is room for; returns the rest."""
        count = min(len(flat), self.room)
        self._memory[self._used : self._used + count].copy_(flat[:count], non_blocking=True)
        self._used += count
        if flat.device.type == "cuda":
            self._sent = torch.cuda.current_stream(flat.device).record_event()
        return flat[count:]

    def content(self) -> memoryview:
        """What was taken, once it is here."""
        if self._sent is not None:
            self._sent.synchronize()
        content: memoryview = self._memory.numpy().data
        return content[: self._used]

    def empty(self) -> None:
        """Make room."""
        self._used, self._sent = 0, None


def _emptied(filled: deque[_Buffer], free: list[_Buffer], count: int) -> Iterator[memoryview]:
    """What the oldest buffers hold, until `count` are left; they are free afterwards."""
    while len(filled) > count:
        yield filled[0].content()
        filled[0].empty()
        free.append(filled.popleft())


def _on_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"
