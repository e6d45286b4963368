"""How long steps take, and a word where one takes far longer than its like.

A step's seconds begin when its batch is asked for and end when its update is done, by the clock of the device, because
the host may be steps ahead of it; previews, validation and saves between steps are not counted. Steps are compared with
those on the same sizes. The usual reasons of a slow one can be told apart by looking at the right moment: waiting for
the batch, compiling, an allocator at its limit, a driver that moves the card's memory to the system. Each reason is
named once.
"""

import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

from wanlora.foundation.log import log
from wanlora.memory.limit import driver_spills
from wanlora.memory.marks import HostMarks, Marks
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
    """What can be seen at one moment on the host."""

    seconds: float
    compilations: int
    retries: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PacedStep:
    """A step that was queued, and what was seen meanwhile."""

    sizes: str
    began: Any
    ended: Any
    """Marks of the device."""
    waited: float
    """Seconds in which its batch was read."""
    paused: float
    """Seconds of the host since the step before."""
    compiled: bool
    rearranged: bool
    spilling: bool
    peak: int | None


class Pace:
    """Call `begin`, `loaded` and `finish` in every step, and `judge` in the same order, later or at once.

    `clock` gives the host's seconds, `marks` the device's.
    """

    def __init__(
        self,
        meter: Meter | None = None,
        marks: Marks | None = None,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.meter = meter
        self.marks = marks or HostMarks(clock)
        self.clock = clock
        self._began = self._look()
        self._began_mark = self.marks.mark()
        self._loaded = self._ended = self._began.seconds
        self._seconds: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_WINDOW))
        self._named: set[str] = set()

    def begin(self) -> None:
        """A batch is about to be asked for. Memory that a preview or a validation took before is not the step's."""
        if self.meter:
            self.meter.take_highest()
        self._began_mark, self._began = self.marks.mark(), self._look()
        self._loaded = self._began.seconds

    def loaded(self) -> None:
        """The batch is there."""
        self._loaded = self.clock()

    def finish(self, sizes: str) -> PacedStep:
        """The update of a step on batches of these sizes is queued."""
        now, began = self._look(), self._began
        step = PacedStep(
            sizes=sizes,
            began=self._began_mark,
            ended=self.marks.mark(),
            waited=self._loaded - began.seconds,
            paused=began.seconds - self._ended,
            compiled=now.compilations > began.compilations,
            rearranged=now.retries > began.retries,
            spilling=self._spilling(),
            peak=self.meter.take_highest() if self.meter else None,
        )
        self._ended = now.seconds
        return step

    def judge(self, step: PacedStep) -> dict[str, float]:
        """The seconds of a step and the card's peak memory in it, GiB. Waits until its update is done."""
        values = {"seconds": self.marks.seconds(step.began, step.ended)}
        if step.peak is not None:
            values["memory/peak_gib"] = step.peak / GIB
        self._compare(step, values["seconds"])
        return values

    def _compare(self, step: PacedStep, seconds: float) -> None:
        before = self._seconds[step.sizes]
        usual = median(before) if len(before) >= _MIN_STEPS else None
        before.append(seconds)
        if usual is None or seconds < _SLOW * usual or seconds - usual < _MIN_EXCESS_SECONDS:
            return
        reason = _reason(step, seconds - usual)
        if reason not in self._named:
            self._named.add(reason)
            log.warning(
                f"a step on {step.sizes} took {seconds:.1f} s, {seconds / usual:.0f} times as long as usual "
                f"({usual:.2f} s): {reason}"
            )

    def _look(self) -> _Moment:
        return _Moment(self.clock(), compilations(), self.meter.retries() if self.meter else 0)

    def _spilling(self) -> bool:
        return self.meter is not None and driver_spills() and self.meter.free() < _FULL_BYTES


def _reason(step: PacedStep, excess: float) -> str:
    """The likeliest reason for so many seconds more than usual."""
    if step.waited > excess / 2:
        return "it waited for its batch to be read; raise --max_data_loader_n_workers or use a faster disk for caches"
    if step.compiled:
        return "blocks were compiled for this size"
    if step.spilling:
        return (
            "the card's memory is full, and this driver then moves it to the system; raise --vram_reserve, close "
            "other programs, or turn the driver's system memory fallback off"
        )
    if step.rearranged:
        return (
            "the card's memory was full and had to be rearranged; lower --activation_memory or raise "
            "--blocks_to_swap or --vram_reserve"
        )
    if step.paused > _PAUSE_SECONDS:
        return "it was the first after a preview, a validation or a save, which leave the memory to be taken anew"
    return "the reason is outside of this program: another one on the card or the processors, or a card that is hot"


def compilations() -> int:
    """Graphs that torch.compile has made so far; 0 where it was never loaded."""
    utilities = sys.modules.get("torch._dynamo.utils")
    return int(utilities.counters["stats"]["unique_graphs"]) if utilities else 0
