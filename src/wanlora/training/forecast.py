"""What was foretold, held against the run.

Memory: the first peak of every size is compared with what is foretold of a step that keeps and streams as much; the
largest difference is said once, so that the plan can be trusted or not. The very first step, at which the optimizer
remembers nothing yet, and steps that memory did not suffice for at first are left out. Time: once the usual sizes have
been measured, what a step takes on average and what is left of the run is said once. The first step of a size counts
for nothing there: it may have been compiled.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from wanlora.data.order import fixed_batches
from wanlora.data.plan import DataPlan
from wanlora.foundation.log import log
from wanlora.foundation.shapes import LatentShape, PixelShape
from wanlora.memory.checkpointing import KEEPS_NOTHING, Kept
from wanlora.memory.measure import GIB
from wanlora.memory.outlook import Load, Outlook
from wanlora.training.plan_report import duration

_TIMES = 3
"""Steps of a size, the first included, before its time is believed."""
_COVERED = 0.9
"""The part of an epoch whose sizes have to be known."""
_MIXED_STEPS = 20
"""Steps before a mean is told where each step is on several batches."""


@dataclass(frozen=True, slots=True)
class Size:
    """Of a batch."""

    pixels: PixelShape
    batch: int

    def __str__(self) -> str:
        return f"{self.pixels} x {self.batch}" if self.batch > 1 else str(self.pixels)

    @property
    def load(self) -> Load:
        """What decides its memory."""
        return Load(tokens=LatentShape.of(self.pixels).num_tokens, batch=self.batch)


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One step, as it was."""

    sizes: Sequence[Size]
    """Of its batches on this process."""
    seconds: float
    kept: Kept = KEEPS_NOTHING
    """What was kept in the last batch."""
    peak: float | None = None
    """GiB; None where nothing can be asked."""
    streamed: int = 0
    """Blocks that were streamed."""
    buffers: int = 0
    """Device buffers that they shared."""
    transposed: bool = False
    """There were transposed weights."""
    retried: bool = False
    """Memory ran out at first; the peak is that of what was tried."""


Forecast = Callable[[Measured, int], None]
"""To be called after every step, with the number of steps that are left."""


def sizes_of_epoch(plan: DataPlan) -> Counter[Size]:
    """How many batches of each size an epoch has."""
    return Counter(Size(batch.pixels, len(batch.indexes)) for batch in fixed_batches(plan))


class PeakForecast:
    """Compares peaks in a run that has `sizes`."""

    def __init__(self, outlook: Outlook, sizes: Mapping[Size, int]) -> None:
        self.outlook = outlook
        self.missing = set(sizes)
        self._first = True
        self._worst = (0.0, "")

    def __call__(self, step: Measured, steps_left: int) -> None:
        """Take note of a step; the one that completes the comparison is followed by its line."""
        first, self._first = self._first, False
        size = step.sizes[0] if len(step.sizes) == 1 else None
        if first or step.retried or step.peak is None or size not in self.missing:
            return
        swapped = step.streamed - step.buffers
        outlook = replace(self.outlook, swapped=swapped, by_size={}, ring=step.buffers, transposed=step.transposed)
        foretold = outlook.peak(size.load, step.kept) / GIB
        line = f"{size}, foretold {foretold:.1f} GiB, measured {step.peak:.1f}"
        self._worst = max(self._worst, (abs(foretold / step.peak - 1), line))
        self.missing.discard(size)
        if not self.missing:
            log.info(f"the memory of every size was foretold within {self._worst[0]:.1%}: {self._worst[1]}")


class TimeForecast:
    """Tells once what is left. An epoch has `sizes`."""

    def __init__(self, sizes: Mapping[Size, int]) -> None:
        self.sizes = sizes
        self.told = False
        self._seconds: defaultdict[Size, list[float]] = defaultdict(list)
        self._mixed: list[float] = []

    def __call__(self, step: Measured, steps_left: int) -> None:
        """Take note of a step after which there are `steps_left`."""
        if self.told:
            return
        if len(step.sizes) == 1:
            self._seconds[step.sizes[0]].append(step.seconds)
        elif step.sizes:
            self._mixed.append(step.seconds)
        mean = self._mean()
        if mean is not None and steps_left:
            self.told = True
            log.info(f"a step takes {mean:.2f} s on average, what is left takes about {duration(mean * steps_left)}")

    def _mean(self) -> float | None:
        """Seconds of an average step; None while too little is known."""
        if self._mixed:
            return median(self._mixed[1:]) if len(self._mixed) > _MIXED_STEPS else None
        known = {size: median(times[1:]) for size, times in self._seconds.items() if len(times) >= _TIMES}
        covered = sum(self.sizes.get(size, 0) for size in known)
        if covered < _COVERED * sum(self.sizes.values()):
            return None
        return sum(self.sizes.get(size, 0) * seconds for size, seconds in known.items()) / covered
