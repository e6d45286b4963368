"""What a run will hold and how long its steps will take, before anything is loaded; and what to change if it is too
much.

Puts together what rests on the card (`resting.py`), what a step needs (`footprint.py`), and arithmetic and rates
(`flops.py`, `cards.py`). Everything here is a pure function of an `Outlook`, a frozen value that says how a run is set
up: other settings are other values, so looking for settings that fit is trying them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from wanlora.memory.cards import Card, step_seconds
from wanlora.memory.checkpointing import KEEPS_NOTHING, Kept
from wanlora.memory.flops import Flops, step_flops
from wanlora.memory.footprint import BlockMaths, kept_block, recomputed_block, step_peak, workspace
from wanlora.memory.resting import WeightFormats, block_weights, linear_sizes, outer_weights, transposed_weights

_OFFLOADED_INPUTS = 2
"""Block inputs that are on the card at a time when they are kept on the host."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """One batch."""

    tokens: int
    """Of one sample."""
    batch: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Outlook:
    """How a run is set up, as far as memory and time depend on it."""

    maths: BlockMaths
    formats: WeightFormats
    trained: int
    """Numbers in the adapters."""
    state_bytes: float
    """What the optimizer remembers of each."""
    swapped: int = 0
    """Blocks whose memory is freed."""
    ring: int = 2
    """Device buffers that streamed blocks share."""
    recompute: bool = True
    """Blocks are computed again in backward; streamed ones are in any case."""
    activations: int | None = None
    """Bytes that a step may need before blocks are computed again; None: what is left."""
    offload: bool = False
    """Inputs of recomputed blocks are kept on the host."""
    accumulates: bool = False
    """Gradients of several batches are added up."""
    fp8_products: bool = False
    """Blocks multiply in fp8."""
    transposed: bool = False
    """Their weights are there transposed as well, unless blocks are swapped."""

    @property
    def num_blocks(self) -> int:
        """Of the model."""
        return self.maths.sizes.num_layers

    @property
    def streamed(self) -> int:
        """Blocks that wait on the host: those swapped, and as many as the ring holds."""
        return min(self.num_blocks, self.swapped + self.ring) if self.swapped else 0

    @property
    def optional(self) -> int:
        """Blocks that need not be recomputed: streamed ones have to be, unless they are compiled."""
        return self.num_blocks if self.maths.compiled else self.num_blocks - self.streamed

    @property
    def kept(self) -> Kept:
        """What blocks keep before memory is looked at."""
        return Kept(0 if self.recompute else self.optional)

    @property
    def host(self) -> int:
        """Bytes of system memory that streamed blocks take, page-locked."""
        return self.streamed * block_weights(self.maths.sizes, self.formats)

    @property
    def transposed_bytes(self) -> int:
        """Bytes that transposed weights take."""
        return self.num_blocks * transposed_weights(self.maths.sizes) if self.transposed and not self.streamed else 0

    def resting(self) -> dict[str, int]:
        """Bytes on the card between steps, by what holds them."""
        sizes, block = self.maths.sizes, block_weights(self.maths.sizes, self.formats)
        return {
            "weights": (self.num_blocks - self.streamed) * block + outer_weights(sizes, self.formats),
            "transposed weights": self.transposed_bytes,
            "buffers of swapped blocks": min(self.ring, self.streamed) * block,
            "LoRA": 4 * self.trained,
            "optimizer": round(self.state_bytes * self.trained),
        }

    def step(self, load: Load) -> dict[str, int]:
        """Bytes that a step adds at its peak, by what holds them."""
        tokens, batch = load.tokens, load.batch
        work = workspace(self.maths, tokens, batch)
        if self.kept.blocks < self.num_blocks:
            work += kept_block(self.maths, tokens, batch) - recomputed_block(self.maths, tokens, batch)
        work = min(work, self._peak(load))
        return {"held for backward": max(self._peak(load), self._update()) - work, "one block at work": work}

    def peak(self, load: Load, kept: Kept | None = None) -> int:
        """Bytes that tensors hold at most while a batch is trained on, with so much kept (default: `kept`)."""
        return sum(self.resting().values()) + max(self._peak(load, kept), self._update())

    def most_kept(self, load: Load, room: int) -> Kept:
        """The most that can be kept within `room` bytes: all blocks, else attention first and then blocks."""
        spare = room - sum(self.resting().values())
        spare = spare if self.activations is None else min(spare, self.activations)
        choices = [Kept(blocks) for blocks in range(self.optional, 0, -1)]
        if self.maths.compiled:
            choices[1:] = [Kept(blocks, self.optional - blocks) for blocks in range(self.optional - 1, 0, -1)]
            choices += [Kept(0, attention) for attention in range(self.optional, 0, -1)]
        return next((kept for kept in choices if self._peak(load, kept) <= spare), KEEPS_NOTHING)

    def offloaded(self, load: Load) -> int:
        """Bytes of system memory that the inputs of recomputed blocks take."""
        if not self.offload or not self.recompute:
            return 0
        return self.num_blocks * recomputed_block(self.maths, load.tokens, load.batch)

    def flops(self, load: Load, *, kept: Kept) -> Flops:
        """Operations of a step over one batch of which so much is kept."""
        return step_flops(
            self.maths.sizes,
            load.tokens,
            load.batch,
            text_rows=self.maths.text_rows,
            recomputed=self.num_blocks - kept.blocks,
            attention_kept=kept.attention,
            trained=self.trained,
        )

    def seconds(self, load: Load, card: Card, *, kept: Kept) -> float:
        """About how long such a step takes."""
        block = block_weights(self.maths.sizes, self.formats)
        return step_seconds(
            card,
            self.flops(load, kept=kept),
            widened=(3 * self.num_blocks - kept.blocks) * self._widened() + self._transposed_anew(),
            copied=2 * (self.streamed - min(self.ring, self.streamed)) * block + 2 * self.offloaded(load),
            compiled=self.maths.compiled,
            fp8_products=self.fp8_products,
        )

    def _peak(self, load: Load, kept: Kept | None = None) -> int:
        """Bytes of forward and backward."""
        number, attention, everything = self.kept if kept is None else kept
        peak = step_peak(
            self.maths,
            load.tokens,
            load.batch,
            num_kept=number,
            attention=attention,
            everything=everything,
            gradients=4 * self.trained,
            accumulates=self.accumulates,
        )
        if not self.offload:
            return peak
        away = max(self.num_blocks - number - _OFFLOADED_INPUTS, 0)
        return peak - away * recomputed_block(self.maths, load.tokens, load.batch)

    def _update(self) -> int:
        """Bytes of gradients and of what an ordinary optimizer computes of them."""
        return (4 + 4) * self.trained if self.state_bytes > 4 else 4 * self.trained

    def _transposed_anew(self) -> float:
        """Bytes moved to transpose fp8 weights for backward: read and written."""
        if not self.fp8_products or self.transposed_bytes:
            return 0.0
        return 2.0 * self.num_blocks * transposed_weights(self.maths.sizes)

    def _widened(self) -> float:
        """Bytes moved to widen the fp8 weights of one block: read, written, read."""
        if not self.maths.fp8 or self.fp8_products:
            return 0.0
        weights = sum(out * into for out, into in linear_sizes(self.maths.sizes).values())
        return weights * (1.0 + 2 * self.maths.compute.itemsize)


def fits(outlook: Outlook, loads: Iterable[Load], room: int, *, besides: int = 0) -> bool:
    """Whether every batch can be trained on within `room` bytes, and `besides` bytes be taken between steps."""
    return sum(outlook.resting().values()) + besides <= room and all(outlook.peak(load) <= room for load in loads)


def fewest_swapped(outlook: Outlook, loads: Iterable[Load], room: int, *, besides: int = 0) -> int | None:
    """The smallest number of swapped blocks that satisfies `fits`; None if none does."""
    listed = list(loads)
    numbers = range(outlook.num_blocks - outlook.ring + 1)
    return next(
        (number for number in numbers if fits(replace(outlook, swapped=number), listed, room, besides=besides)), None
    )


def cures(outlook: Outlook, loads: Iterable[Load], room: int) -> dict[str, Outlook]:
    """Settings with which every batch fits into `room` bytes, by the flags to type, those that swap least first."""
    listed = list(loads)
    found: dict[str, Outlook] = {}
    for flags, candidate in _changes(outlook).items():
        number = outlook.swapped if fits(candidate, listed, room) else fewest_swapped(candidate, listed, room)
        if number is None:
            continue
        swap = "" if number == outlook.swapped else f"--blocks_to_swap {number}"
        name = " ".join(part for part in (flags, swap) if part)
        if name:
            found[name] = replace(candidate, swapped=number)
    return dict(sorted(found.items(), key=lambda entry: entry[1].swapped))


def _changes(outlook: Outlook) -> Mapping[str, Outlook]:
    """What may be changed, alone and together, by the flags to type."""
    changes = {"": outlook}
    if outlook.transposed:
        outlook = replace(outlook, transposed=False)
        changes = {"--fp8_fast_transposed off": outlook}
    if not outlook.recompute:
        flags = next(iter(changes))
        changes[f"{flags} --gradient_checkpointing".strip()] = replace(outlook, recompute=True)
    if not outlook.maths.fp8:
        maths, formats = replace(outlook.maths, fp8=True), replace(outlook.formats, fp8=True)
        for flags, changed in list(changes.items()):
            changes[f"--fp8_base --fp8_scaled {flags}".strip()] = replace(changed, maths=maths, formats=formats)
    if not outlook.offload:
        flags, changed = list(changes.items())[-1]
        if changed.recompute:
            changes[f"{flags} --gradient_checkpointing_cpu_offload".strip()] = replace(changed, offload=True)
    return changes
