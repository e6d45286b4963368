"""How much memory forward does not want yet, and how much backward does not want again.

What blocks keep for backward comes to be block by block, up to nearly all that a step needs beside what was there
before; the rest is what a block at work takes. So in the beginning most of it is free for something that goes as evenly
while forward climbs: if it fits then, it fits all the way.

Backward frees what blocks have kept, block by block from the top down, and takes memory to compute each. Let A be what
tensors held when it began. What it took for the first block beyond A is known to fit; another block may take more only
by as much as it has kept less (a block that is recomputed makes first what another has kept), and what a block has kept
is seen when it is freed. So of what has been freed since the beginning all but the largest piece is to spare.
"""

from collections.abc import Callable

_PASSING = 0.6
"""The part of what a step needs that is surely kept for backward."""


def passing_bytes(need: int) -> int:
    """Bytes that may stay until the forward of a step has given them back on its way; the step needs `need` bytes
    beside what was there before it."""
    return int(_PASSING * need)


class FreedMemory:
    """Memory that a backward pass will not want again; `allocated` gives the bytes that tensors hold."""

    def __init__(self, allocated: Callable[[], int]) -> None:
        self._allocated = allocated
        self._beginning: int | None = None
        self._last = self._largest = 0

    def begin(self) -> None:
        """Backward of the last block begins."""
        self._beginning = self._last = self._allocated()
        self._largest = 0

    def spare(self) -> int:
        """Bytes, between the backwards of two blocks; none before `begin`."""
        if self._beginning is None:
            return 0
        now = self._allocated()
        self._largest = max(self._largest, self._last - now)
        self._last = now
        return self._beginning - now - self._largest

    def take(self, num_bytes: int) -> None:
        """So many have been allocated of what was to spare."""
        self._last += num_bytes
