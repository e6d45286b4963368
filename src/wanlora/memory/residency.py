"""Streamed blocks that stay on the card while small batches come.

Large batches need the memory of many blocks, small ones of few or none. All blocks that any size wants swapped are
streamed for the whole run and have their masters on the host. How many device buffers they share is another matter:
the ring is a cache of them and may be resized between steps (`streaming.py`), which copies and moves nothing by itself.
So before each step the ring gets as many buffers as leave that step's sizes their number of swapped blocks. Behind a
large batch it may have grown by then: what its backward frees is used for buffers at once, so that blocks for the next
forward are copied beside it (`refilling.py`). If that one is large as well, it need not give them back before it
begins: what blocks keep for backward comes to be one by one, and buffers go as it does. The rest is filled by that
forward; what it costs is part of how numbers are chosen (`choices.py`).

Whatever else wants memory between steps gets the smallest ring.
"""

from collections.abc import Iterable, Mapping, Sequence

from wanlora.foundation.log import log
from wanlora.memory.measure import is_out_of_memory
from wanlora.memory.outlook import Load, number_for
from wanlora.memory.refilling import FreedMemory, passing_bytes
from wanlora.memory.streaming import BlockStream


class Residency:
    """Resizes the ring of `stream` so that batches of each size have the number of swapped blocks in `by_size`.

    Sizes without a number have the smallest ring. `buffers` are those of the step at hand while it needs most memory,
    `passing` the bytes of others that its forward gives back.
    """

    def __init__(self, stream: BlockStream, by_size: Mapping[Load, int]) -> None:
        self.stream = stream
        self._by_size = dict(by_size)
        self._all = len(stream.blocks)
        self._needs: dict[Load, int] = {}
        """Bytes that the last step of a size needed beside what was there before it."""
        self._lets_pass = True
        self.buffers = self.passing = 0

    def ring_for(self, loads: Iterable[Load]) -> int:
        """Device buffers for a step on such batches: those of the one that wants most blocks swapped."""
        numbers = [number_for(load, self._by_size) for load in loads]
        most = max((self._all if number is None else number for number in numbers), default=self._all)
        return max(len(self.stream.streamed_indexes) - most, self.stream.base_ring)

    def prepare(self, loads: Iterable[Load]) -> bool:
        """Before a step on such batches, before its memory is measured: whether the ring has changed."""
        loads, before = list(loads), self.stream.ring_size
        try:
            self.stream.resize(self.ring_for(loads), passing=self._passing(loads))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self.give_up(loads)
            self.stream.resize(self.stream.base_ring)
            log.warning(
                "the card's memory does not suffice for all the blocks that were to stay on it for batches of "
                f"{', '.join(str(load.tokens) for load in loads)} tokens: they are swapped from now on"
            )
        self.buffers, self.passing = self.stream.lasting, self.stream.passing_bytes
        return self.stream.ring_size != before

    def note(self, loads: Sequence[Load], need: int | None) -> None:
        """A step on such batches has ended; it needed so many bytes, if that is known."""
        if len(loads) == 1:
            self._needs[loads[0]] = need or 0

    def _passing(self, loads: Sequence[Load]) -> int:
        """Bytes of buffers that may stay until the forward of such batches gives them back."""
        return passing_bytes(self._needs.get(loads[0], 0)) if len(loads) == 1 and self._lets_pass else 0

    def stop_passing(self) -> bool:
        """Memory ran out in a step: from now on buffers go before one begins; False if all were gone by then."""
        were_there = self.stream.ring_size > self.stream.lasting
        self._lets_pass = self._lets_pass and not were_there
        return were_there

    def refill(self, freed: FreedMemory) -> None:
        """Before the last pass of a step: what its backward has `freed` is for blocks that other sizes have there."""
        self.stream.grow(max((self.ring_for([load]) for load in self._by_size), default=0), freed)

    def shrink(self) -> None:
        """Between steps: give back what the ring need not hold."""
        self.stream.resize(self.stream.base_ring)

    def give_up(self, loads: Iterable[Load]) -> int:
        """From now on such batches have the smallest ring; how many blocks more are swapped for them."""
        loads = list(loads)
        before = self.ring_for(loads)
        self._by_size |= dict.fromkeys(loads, self._all)
        return max(min(before, len(self.stream.streamed_indexes)) - self.stream.base_ring, 0)
