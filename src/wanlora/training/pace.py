"""How long steps take, and a word where one takes far longer than its like.

A step's seconds begin when its batch is asked for and end when its update is queued; previews, validation and saves
between steps are not counted. Steps are compared with those on the same sizes. The usual reasons of a slow one can be
told apart by looking at the right moment: waiting for the batch, compiling, an allocator at its limit, a driver that
moves the card's memory to the system. Each reason is named once.
"""

import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from wanlora.foundation.log import log
from wanlora.memory.limit import driver_spills
from wanlora.memory.measure import GIB, Meter

_SLOW = 3.0
_MIN_EXCESS_SECONDS = 1.0
_MIN_STEPS = 5
"""Steps of a size before the next is compared with them."""
_WINDOW = 50
_PAUSE_SECONDS = 1.0
_FULL_BYTES = GIB // 4
"""A card with less than this left is full."""


@dataclass(frozen=True, slots=True)
class _Moment:
    """Counters at the beginning of a step."""

    compilations: int
    retries: int


class Pace:
    """Call `begin`, `loaded` and `finish` in every step; `clock` gives seconds."""

    def __init__(self, meter: Meter | None = None, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self.meter = meter
        self.clock = clock
        self._began = self._loaded = self._ended = clock()
        self._moment = self._look()
        self._seconds: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_WINDOW))
        self._named: set[str] = set()

    def begin(self) -> None:
        """A batch is about to be asked for. Memory that a preview or a validation took before is not the step's."""
        if self.meter:
            self.meter.take_highest()
        self._began = self._loaded = self.clock()
        self._moment = self._look()

    def loaded(self) -> None:
        """The batch is there."""
        self._loaded = self.clock()

    def finish(self, sizes: str) -> dict[str, float]:
        """The step on batches of these sizes is done: its seconds, and the card's peak memory in it, GiB."""
        now = self.clock()
        values = {"seconds": now - self._began}
        if self.meter:
            values["memory/peak_gib"] = self.meter.take_highest() / GIB
        self._compare(sizes, values["seconds"])
        self._ended = now
        return values

    def _compare(self, sizes: str, seconds: float) -> None:
        before = self._seconds[sizes]
        usual = median(before) if len(before) >= _MIN_STEPS else None
        before.append(seconds)
        if usual is None or seconds < _SLOW * usual or seconds - usual < _MIN_EXCESS_SECONDS:
            return
        reason = self._reason(seconds - usual)
        if reason not in self._named:
            self._named.add(reason)
            log.warning(
                f"a step on {sizes} took {seconds:.1f} s, {seconds / usual:.0f} times as long as usual "
                f"({usual:.2f} s): {reason}"
            )

    def _reason(self, excess: float) -> str:
        """The likeliest reason for so many seconds more than usual."""
        now = self._look()
        if self._loaded - self._began > excess / 2:
            return (
                "it waited for its batch to be read; raise --max_data_loader_n_workers or use a faster disk for caches"
            )
        if now.compilations > self._moment.compilations:
            return "blocks were compiled for this size"
        if self._spilling():
            return (
                "the card's memory is full, and this driver then moves it to the system; raise --vram_reserve, close "
                "other programs, or turn the driver's system memory fallback off"
            )
        if now.retries > self._moment.retries:
            return (
                "the card's memory was full and had to be rearranged; lower --activation_memory or raise "
                "--blocks_to_swap or --vram_reserve"
            )
        if self._began - self._ended > _PAUSE_SECONDS:
            return "it was the first after a preview, a validation or a save, which leave the memory to be taken anew"
        return "the reason is outside of this program: another one on the card or the processors, or a card that is hot"

    def _look(self) -> _Moment:
        return _Moment(compilations(), self.meter.retries() if self.meter else 0)

    def _spilling(self) -> bool:
        return self.meter is not None and driver_spills() and self.meter.free() < _FULL_BYTES


def compilations() -> int:
    """Graphs that torch.compile has made so far; 0 where it was never loaded."""
    utilities = sys.modules.get("torch._dynamo.utils")
    return int(utilities.counters["stats"]["unique_graphs"]) if utilities else 0
