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

Compiled blocks can do half: keep the result of attention and recompute the rest. That spares more time for its bytes
than keeping everything, and its bytes are known, so where not all blocks can be kept it comes first, for as many as
fit. What such a block holds is then x and these bytes. Where the first pass promises room for nearly all blocks,
attention waits until no more of them fit: then some are given up for it, if that spares more time (`mixing.py`). Each
gives back at least what blocks have taken on average since nothing was kept, because none takes less than the one
before. The backward that begins at attention needs memory of its own, as much as attention of three blocks (0.4 GiB at
7,488 tokens of the 14B model), which a first try leaves room for; the pass after it knows.

Where all blocks are kept and what they hold could be twice as much, they hold what the compiler likes best, which is
less than that; unless it is known to spare no time (`ample`).

Where nothing can be measured (a CPU) nothing is chosen.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from wanlora.foundation.log import log
from wanlora.memory.checkpointing import KEEPS_NOTHING, Kept
from wanlora.memory.measure import GIB, Meter
from wanlora.memory.mixing import time_spared

_AFTER_FAILURE = 0.95
"""Memory that ran out at some peak is taken to hold this part of it from then on."""
_FORGOTTEN = 0.2
"""Of the times that the allocator rearranged memory for a size, the part that counts no longer after its next pass."""
_RETRIES = 1.5
"""If so many count, the size leaves more to the allocator. One takes 2 % of a pass and lets the host, which had been
ahead, wait for the card; now and then it is usual where sizes follow one another, whose pieces of memory are others."""
_MARGIN = 0.02
"""So much more of the limit each time."""
_FIRST_ON_THE_LINE = 2
"""From so many kept blocks on, what a pass needs grows in a line: before, recomputing one block needs as much."""
_BEGINNING = 4
"""A backward that begins at attention needs no more than what so many blocks keep of attention."""
_SHARE = 0.5
"""A block that is kept takes about this part of what the first pass allows it."""
MOST_OF_EVERYTHING = 2
"""A pass whose blocks hold everything needs at most so many times as much as if they held products."""
_CAUTION = 1.05
_MOST_MARGIN = 0.15
"""Never more than this part."""


@dataclass(slots=True)
class _Size:
    """What is known of one size of input."""

    input_bytes: int
    attention_bytes: int
    """Of the result of attention of a block; 0: it cannot be kept alone."""
    kept: int
    ceiling: int
    """More than this has turned out not to fit."""
    attention_ceiling: int
    optional: int
    """Blocks that may keep anything."""
    chosen: bool
    """Measurements decide; otherwise `kept` stands until memory runs out."""
    need: int | None = None
    """Bytes that the last pass needed beyond what was there before it, with `kept` blocks kept."""
    passes: int = 0
    """Passes in a row with the same number kept."""
    attention: int = 0
    """So many of the others keep the result of attention, if there are that many."""
    everything: bool = False
    """Blocks that are kept hold what the compiler likes best."""
    may_hold_everything: bool = False
    returns: int = 0
    """How often blocks were taken back."""
    nothing: int = 0
    """What a pass needed in which nothing was kept."""
    before: tuple[int, int] = (0, 0)
    """`kept` of the last passes with another number kept, and what they needed without attention that was kept."""
    retries: float = 0
    """Times that the allocator rearranged memory in its passes lately."""
    margin: float = 0
    """The part of the limit that is left to the allocator."""
    least: int | None = None
    """The lowest bound that passes have set to what a block that is kept needs beyond one that is recomputed."""

    def choose(self, room: int, num_inputs: int) -> None:
        """Set `kept` by the last pass and the bytes that a pass may need now."""
        if self.need is None:
            return
        if self.everything:
            self._take_back_everything(room)
            return
        if not self.kept and not self.attention:
            self.nothing = self.need
        self._choose_attention(room, num_inputs)
        wanted = self._as_many_as_fit(room, num_inputs)
        if wanted < self.kept:
            self.returns += 1
            if self.returns > 1:  # a first time may be a compiler's doing
                self.ceiling, self.attention_ceiling = wanted, min(self.attention_ceiling, self.attention)
        if wanted != self.kept:
            self._keep(wanted, self.attention)
        elif wanted < self.optional:
            self._keep(*self._best_mix(room, num_inputs))
        elif self.may_hold_everything and MOST_OF_EVERYTHING * self.need <= room:
            self.everything, self.passes = True, 0

    def attention_beside(self, kept: int) -> int:
        """Blocks that keep the result of attention while `kept` are kept whole."""
        return min(self.attention, self.optional - kept)

    def _keep(self, kept: int, attention: int) -> None:
        """Let the next pass keep so much."""
        if bool(attention) != bool(self.attention):
            self.before = (0, 0)  # a backward that begins at attention needs memory of its own: no line through both
        elif kept != self.kept:
            self.before = (self.kept, self._without_attention())
        if (kept, attention) != (self.kept, self.attention):
            self.kept, self.attention, self.passes = kept, attention, 0

    def _without_attention(self) -> int:
        """What the last pass would have needed if no block had kept attention."""
        assert self.need is not None
        return self.need - self.attention_beside(self.kept) * self.attention_bytes

    def _as_many_as_fit(self, room: int, num_inputs: int) -> int:
        """The most blocks that surely can be kept while attention stays in the others."""
        each, least = self._each(num_inputs), self._without_attention()

        def need(kept: int) -> int:
            return least + (kept - self.kept) * each + self.attention_beside(kept) * self.attention_bytes

        return next((kept for kept in range(self.ceiling, 0, -1) if need(kept) <= room), 0)

    def _best_mix(self, room: int, num_inputs: int) -> tuple[int, int]:
        """Blocks that are kept, no more than now, and others that keep attention: what spares most time and fits."""
        present = (self.kept, self.attention)
        if not self.kept or not self.attention_bytes:
            return present
        each, least, frees = self._each(num_inputs), self._without_attention(), self._frees()

        def spared(mix: tuple[int, int]) -> float:
            return time_spared(*mix, products_bytes=each, attention_bytes=self.attention_bytes)

        best = (self.kept, self.attention_beside(self.kept))
        for kept in range(self.kept, -1 if frees else self.kept - 1, -1):
            spare = room - least + (self.kept - kept) * frees
            attention = min(self._attention_within(spare), self.optional - kept, self.attention_ceiling)
            best = max(best, (kept, attention), key=spared)
        return present if best == (self.kept, self.attention_beside(self.kept)) else best

    def _frees(self) -> int:
        """Bytes that a block at least gives back if it is kept no longer; 0 where that was not measured."""
        return max(self._without_attention() - self.nothing, 0) // self.kept if self.nothing else 0

    def _take_back_everything(self, room: int) -> None:
        if self.need is not None and self.need > room:
            self.everything = self.may_hold_everything = False
            self.need, self.passes = None, 0

    def _choose_attention(self, room: int, num_inputs: int) -> None:
        """Keep attention in as many blocks as its bytes allow, where not all blocks can be kept whole."""
        assert self.need is not None
        spare = room - self.need
        if self.kept or not self.attention_bytes or spare > _SHARE * self.ceiling * self._each(num_inputs):
            return
        wanted = min(max(self.attention + self._attention_within(spare), 0), self.attention_ceiling)
        if wanted == self.attention:
            return
        if wanted < self.attention:
            self.attention_ceiling = wanted
        self.need += (wanted - self.attention) * self.attention_bytes
        self.attention, self.passes = wanted, 0

    def _attention_within(self, spare: int) -> int:
        """Blocks that may keep attention in so many bytes."""
        return max(spare // self.attention_bytes - (0 if self.attention else _BEGINNING), -self.attention)

    def _each(self, num_inputs: int) -> int:
        """Bytes that a block that is kept needs at most beyond one that is recomputed."""
        least = self._without_attention()
        bound = max((least - num_inputs * self.input_bytes) // max(self.kept, 1), 1)
        self.least = each = min(bound, self.least or bound)
        kept, need = self.before
        if kept < _FIRST_ON_THE_LINE or kept == self.kept:
            return each
        beyond_attention = (least - need) / (self.kept - kept) - self.attention_bytes  # that part is known
        return min(self.attention_bytes + max(int(_CAUTION * beyond_attention), self.input_bytes), each)


class Keeping:
    """The `keep` of `Recompute`. Inside `step` and `batch` it measures and chooses; elsewhere everything is recomputed.

    `num_optional` of `num_blocks` may be kept; recomputation holds `num_inputs` block inputs on the card. `limit` bytes
    may be allocated in all, and one pass may take `activations` of them. `attention` bytes a token are what a block
    holds of attention if it keeps that alone; 0: it cannot. `everything`: all blocks are kept until memory runs out
    once. `ample`: where much is left they hold what the compiler likes best, and never otherwise. Without a `meter`
    nothing is chosen.
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
        attention: int = 0,
        everything: bool = False,
        ample: bool = True,
    ) -> None:
        self.num_optional = num_optional
        self.num_blocks = num_blocks
        self.meter = meter
        self.limit = limit
        self.activations = activations
        self.num_inputs = num_blocks if num_inputs is None else num_inputs
        self.aside = 0
        """Bytes below the limit that passes must leave, because they could not be given back in time."""
        self.attention = attention
        self.ample = ample
        self._everything_below: float = float("inf") if everything else 0
        """Inputs of this many bytes have run out of memory with everything kept."""
        self._sizes: dict[tuple[int, ...], _Size] = {}
        self._active: _Size | None = None
        self._watching = False
        self._baseline = 0
        self._said: dict[str, Kept] = {}

    def __call__(self, x: Tensor) -> Kept:
        """What blocks keep of what they compute from this residual stream [B, L, D]."""
        if not self._watching:
            return Kept(self.num_optional if self._everything_below == float("inf") else 0)
        if self._active is None:
            self._active = self._size_of(x)
            if self._active.chosen:
                self._active.choose(self._room(self._active), self.num_inputs)
        return self.kept if self._active is self._size_of(x) else KEEPS_NOTHING

    @property
    def kept(self) -> Kept:
        """What is kept in the pass at hand, or was in the last one."""
        if self._active is None:
            return KEEPS_NOTHING
        size = self._active
        return Kept(size.kept, size.attention_beside(size.kept), size.everything)

    @property
    def need(self) -> int | None:
        """Bytes that the last pass needed beyond what was there before it, if it was measured."""
        return self._active.need if self._active else None

    @contextmanager
    def step(self, *, passing: int = 0) -> Iterator[None]:
        """Around all passes of a step; what is allocated before the first of them stays whatever is kept, but for
        `passing` bytes that forward gives back."""
        self._baseline = self.meter.allocated() - passing if self.meter else 0
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
                self._take(self._active, label, retries=self.meter.retries() - retries)
        finally:
            self._watching = False

    def allow(self, num_optional: int) -> None:
        """From now on at most so many blocks may be kept. Between passes only."""
        self.num_optional = num_optional
        for size in self._sizes.values():
            if size.kept + size.attention_beside(size.kept) > num_optional:
                size.kept, size.need, size.passes = min(size.kept, num_optional), None, 0
            size.optional, size.ceiling = num_optional, min(size.ceiling, num_optional)

    def give_up(self) -> Kept:
        """After memory ran out in a pass: let the next one of this size recompute everything.

        What had been kept; if it was nothing, nothing could be done.
        """
        size, given_up = self._active, self.kept
        if size is None or given_up == KEEPS_NOTHING:
            return KEEPS_NOTHING
        if size.chosen:
            size.ceiling = size.kept - 1 if size.kept else size.ceiling
        else:
            self._everything_below = min(self._everything_below, size.input_bytes)
        if self.meter:
            self.limit = min(self.limit, int(_AFTER_FAILURE * self.meter.peak()))
        for other in self._sizes.values():
            if not other.chosen and other.input_bytes >= self._everything_below:
                other.chosen, other.kept, other.need = True, 0, None
        if size.attention and not size.kept:
            size.attention_ceiling = size.attention - 1
        size.everything = size.may_hold_everything = False
        size.kept, size.attention, size.need, size.passes = 0, 0, None, 0
        size.before, size.least = (0, 0), None
        return given_up

    def _size_of(self, x: Tensor) -> _Size:
        key = (*x.shape, x.element_size())
        if key not in self._sizes:
            num_bytes = x.numel() * x.element_size()
            everything = num_bytes < self._everything_below
            self._sizes[key] = _Size(
                input_bytes=num_bytes,
                attention_bytes=x.shape[0] * x.shape[1] * self.attention,
                may_hold_everything=self.ample and self.attention > 0,
                kept=self.num_optional if everything else 0,
                optional=self.num_optional,
                ceiling=self.num_optional,
                attention_ceiling=self.num_optional,
                chosen=not everything,
            )
        return self._sizes[key]

    def _limit_of(self, size: _Size) -> int:
        """Bytes that may be allocated in all in a pass of this size."""
        return int((1 - size.margin) * self.limit)

    def _room(self, size: _Size) -> int:
        """Bytes that the pass at hand may need."""
        room = self._limit_of(size) - self.aside - self._baseline
        return room if self.activations is None else min(room, self.activations)

    def _take(self, size: _Size, label: str, *, retries: int) -> None:
        """Note what a pass needed, and say once what has settled."""
        assert self.meter is not None
        peak = self.meter.peak()
        size.need = peak - self._baseline
        size.passes += 1
        size.retries = (1 - _FORGOTTEN) * size.retries + (retries if self.kept != KEEPS_NOTHING else 0)
        if size.retries >= _RETRIES:
            size.retries, size.margin = 0, min(size.margin + _MARGIN, _MOST_MARGIN)
        kept = self.kept
        if size.passes == 2 and self._said.get(label) != kept:
            self._said[label] = kept
            whole = ", with all that the compiler likes to save" if kept.everything else ""
            half = f", {kept.attention} the result of attention" if kept.attention else ""
            others = ", the others are recomputed" if kept.blocks + kept.attention < self.num_blocks else ""
            log.info(
                f"{label}: {kept.blocks} of {self.num_blocks} blocks keep what they computed{whole}{half}{others}; "
                f"peak {peak / GIB:.1f} of {self._limit_of(size) / GIB:.1f} GiB"
            )
