"""How many blocks keep what they computed: as many as the card was measured to hold, for each size of input.

Recomputing a block costs a third of its time, so it is done only where memory demands it. How much a block keeps
depends on kernels and compilers that no formula knows; so it is measured, and never more is tried than the measurements
allow.

The first pass of a size recomputes everything. Let P be what a pass needed at most beyond what was there before it, and
x the bytes of a block's input. With k blocks kept out of N, the pass held at the turn from forward to backward at least
what k blocks keep and N - k inputs, so a block that is kept costs at most (P - N x) / k more than one that is
recomputed (with k = 0: P - N x, because the last block was recomputed while all inputs were there). The room that is
left, divided by this, is how many more are kept the next time. Every pass gives such a bound and the least of them
holds: they grow tighter with k, but what a pass takes at the turn for other things (the loss) counts from the first
block on. Two passes with different k > 1 give the slope itself: three or four passes come within a block or two of the
most that fits, from below. A pass that is found above the limit takes back blocks by the same rule; the second time
they stay taken back.

Where nothing can be measured (a CPU) nothing is chosen.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from wanlora.foundation.log import log
from wanlora.memory.measure import GIB, Meter

_AFTER_FAILURE = 0.95
"""Memory that ran out at some peak is taken to hold this part of it from then on."""
_AFTER_RETRY = 0.98
_FIRST_ON_THE_LINE = 2
"""From so many kept blocks on, what a pass needs grows in a line: before, recomputing one block needs as much."""
_CAUTION = 1.05
_LOWEST = 0.85
"""The limit is never lowered below this part of the first for the allocator's sake."""


@dataclass(slots=True)
class _Size:
    """What is known of one size of input."""

    input_bytes: int
    kept: int
    ceiling: int
    """More than this has turned out not to fit."""
    chosen: bool
    """Measurements decide; otherwise `kept` stands until memory runs out."""
    need: int | None = None
    """Bytes that the last pass needed beyond what was there before it, with `kept` blocks kept."""
    passes: int = 0
    """Passes in a row with the same number kept."""
    returns: int = 0
    """How often blocks were taken back."""
    before: tuple[int, int] = (0, 0)
    """`kept` and `need` of the last passes with another number kept."""
    least: int | None = None
    """The lowest bound that passes have set to what one block more needs."""

    def choose(self, room: int, num_inputs: int) -> None:
        """Set `kept` by the last pass and the bytes that a pass may need now."""
        if self.need is None:
            return
        wanted = min(max(self.kept + (room - self.need) // self._each(num_inputs), 0), self.ceiling)
        if wanted < self.kept:
            self.returns += 1
            self.ceiling = wanted if self.returns > 1 else self.ceiling  # a first time may be a compiler's doing
        if wanted != self.kept:
            self.before = (self.kept, self.need)
            self.passes = 0
        self.kept = wanted

    def _each(self, num_inputs: int) -> int:
        """Bytes that one block more will need at most."""
        assert self.need is not None
        bound = max((self.need - num_inputs * self.input_bytes) // max(self.kept, 1), 1)
        self.least = each = min(bound, self.least or bound)
        kept, need = self.before
        if kept < _FIRST_ON_THE_LINE or kept == self.kept:
            return each
        return min(max(int(_CAUTION * (self.need - need) / (self.kept - kept)), self.input_bytes), each)


class Keeping:
    """The `keep` of `Recompute`. Inside `step` and `batch` it measures and chooses; elsewhere everything is recomputed.

    `num_optional` of `num_blocks` may be kept; recomputation holds `num_inputs` block inputs on the card. `limit` bytes
    may be allocated in all, and one pass may take `activations` of them. `everything`: all blocks are kept until memory
    runs out once. Without a `meter` nothing is chosen.
    """

    def __init__(
        self,
        num_optional: int,
        num_blocks: int,
        *,
        meter: Meter | None = None,
        limit: int = 0,
        activations: int | None = None,
        num_inputs: int | None = None,
        everything: bool = False,
    ) -> None:
        self.num_optional = num_optional
        self.num_blocks = num_blocks
        self.meter = meter
        self.limit = self._first_limit = limit
        self.activations = activations
        self.num_inputs = num_blocks if num_inputs is None else num_inputs
        self.aside = 0
        """Bytes below the limit that passes must leave, because they could not be given back in time."""
        self._everything_below: float = float("inf") if everything else 0
        """Inputs of this many bytes have run out of memory with everything kept."""
        self._sizes: dict[tuple[int, ...], _Size] = {}
        self._active: _Size | None = None
        self._watching = False
        self._baseline = 0
        self._said: dict[str, int] = {}

    def __call__(self, x: Tensor) -> int:
        """How many blocks keep what they compute from this residual stream [B, L, D]."""
        if not self._watching:
            return self.num_optional if self._everything_below == float("inf") else 0
        if self._active is None:
            self._active = self._size_of(x)
            if self._active.chosen:
                self._active.choose(self._room(), self.num_inputs)
        return self.num_kept if self._active is self._size_of(x) else 0

    @property
    def num_kept(self) -> int:
        """Blocks that keep what they compute in the pass at hand, or did in the last one."""
        return min(self._active.kept, self.num_optional) if self._active else 0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around all passes of a step; what is allocated before the first of them stays whatever is kept."""
        self._baseline = self.meter.allocated() if self.meter else 0
        yield

    @contextmanager
    def batch(self, label: str) -> Iterator[None]:
        """Around one forward and backward pass, called `label` in messages. An error leaves it unmeasured."""
        self._watching, self._active = True, None
        if self.meter:
            self.meter.reset()
            retries = self.meter.retries()
        try:
            yield
            if self.meter and self._active and self._active.chosen:
                self._take(self._active, label, retried=self.meter.retries() > retries)
        finally:
            self._watching = False

    def give_up(self) -> int:
        """After memory ran out in a pass: let the next one of this size recompute everything.

        How many blocks had been kept; with 0 nothing could be done.
        """
        size = self._active
        if size is None or self.num_kept == 0:
            return 0
        given_up = self.num_kept
        if size.chosen:
            size.ceiling = size.kept - 1
        else:
            self._everything_below = min(self._everything_below, size.input_bytes)
        if self.meter:
            self.limit = min(self.limit, int(_AFTER_FAILURE * self.meter.peak()))
        for other in self._sizes.values():
            if not other.chosen and other.input_bytes >= self._everything_below:
                other.chosen, other.kept, other.need = True, 0, None
        size.kept, size.need, size.passes = 0, None, 0
        return given_up

    def _size_of(self, x: Tensor) -> _Size:
        key = (*x.shape, x.element_size())
        if key not in self._sizes:
            num_bytes = x.numel() * x.element_size()
            everything = num_bytes < self._everything_below
            self._sizes[key] = _Size(
                input_bytes=num_bytes,
                kept=self.num_optional if everything else 0,
                ceiling=self.num_optional,
                chosen=not everything,
            )
        return self._sizes[key]

    def _room(self) -> int:
        """Bytes that the pass at hand may need."""
        room = self.limit - self.aside - self._baseline
        return room if self.activations is None else min(room, self.activations)

    def _take(self, size: _Size, label: str, *, retried: bool) -> None:
        """Note what a pass needed, and say once what has settled."""
        assert self.meter is not None
        peak = self.meter.peak()
        size.need = peak - self._baseline
        size.passes += 1
        if retried and size.kept:
            self.limit = max(int(_AFTER_RETRY * self.limit), int(_LOWEST * self._first_limit))
        if size.passes == 2 and self._said.get(label) != size.kept:
            self._said[label] = size.kept
            log.info(
                f"{label}: {size.kept} of {self.num_blocks} blocks keep what they computed, the others are recomputed; "
                f"peak {peak / GIB:.1f} of {self.limit / GIB:.1f} GiB"
            )
