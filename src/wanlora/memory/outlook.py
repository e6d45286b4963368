"""What a run will hold and how long its steps will take, before anything is loaded.

Puts together what rests on the card (`resting.py`), what a step needs (`footprint.py`), and arithmetic, work and rates
(`flops.py`, `work.py`, `cards.py`). Everything here is a pure function of an `Outlook`, a frozen value that says how a
run is set up: other settings are other values, so looking for better settings is trying them (`choices.py`).
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from wanlora.memory.cards import Card, copy_seconds, work_seconds
from wanlora.memory.checkpointing import Kept
from wanlora.memory.flops import Flops, step_flops
from wanlora.memory.footprint import (
    BlockMaths,
    attention_per_token,
    kept_block,
    recomputed_block,
    step_peak,
    workspace,
)
from wanlora.memory.keeping import MOST_OF_EVERYTHING
from wanlora.memory.mixing import time_spared
from wanlora.memory.refilling import passing_bytes
from wanlora.memory.resting import WeightFormats, block_weights, outer_weights, transposed_weights
from wanlora.memory.work import Saved, block_work

_OFFLOADED_INPUTS = 2
"""Block inputs that are on the card at a time when they are kept on the host."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """One batch."""

    tokens: int
    """Of one sample."""
    batch: int = 1


def number_for(load: Load, numbers: Mapping[Load, int]) -> int | None:
    """Its own of `numbers`; for the last batch of an epoch, which may be smaller, that of whole ones; else None."""
    if load in numbers:
        return numbers[load]
    alike = [other for other in numbers if other.tokens == load.tokens and other.batch >= load.batch]
    return numbers[min(alike, key=lambda other: other.batch)] if alike else None


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
    by_size: Mapping[Load, int] = field(default_factory=dict)
    """Where sizes have numbers of their own, none above `swapped`: the others of the blocks that wait on the host are
    in buffers while such a batch is trained on."""
    ring: int = 2
    """Device buffers that streamed blocks share at least."""
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
    copied: bool = False
    """Adapters and what the optimizer remembers are copied before an update, because steps are queued ahead."""

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

    def swapped_for(self, load: Load) -> int:
        """Blocks whose memory is freed while such a batch is trained on."""
        number = number_for(load, self.by_size)
        return self.swapped if number is None else number

    def buffers(self, load: Load | None = None) -> int:
        """Device buffers while such a batch is trained on; the least without one."""
        least = min(self.ring, self.streamed)
        return least if load is None else max(least, self.streamed - self.swapped_for(load))

    def resting(self, load: Load | None = None) -> dict[str, int]:
        """Bytes that stay on the card between passes on such batches, by what holds them; the least without one."""
        sizes, block = self.maths.sizes, block_weights(self.maths.sizes, self.formats)
        return {
            "weights": (self.num_blocks - self.streamed) * block + outer_weights(sizes, self.formats),
            "transposed weights": self.transposed_bytes,
            "buffers of swapped blocks": self.buffers(load) * block,
            "LoRA": (4 + self._copy) * self.trained,
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
        return sum(self.resting(load).values()) + max(self._peak(load, kept), self._update())

    def most_kept(self, load: Load, room: int) -> Kept:
        """What a run keeps within `room` bytes, as it chooses by measurement (`keeping.py`)."""
        spare = room - sum(self.resting(load).values())
        spare = spare if self.activations is None else min(spare, self.activations)

        def fits(kept: Kept) -> bool:
            return self._peak(load, kept) <= spare

        optional, whole = self.optional, Kept(self.optional)
        if fits(whole):
            ample = MOST_OF_EVERYTHING * self._peak(load, whole) <= spare
            gains = self.maths.compiled and self.recompute and not self.fp8_products
            return whole._replace(everything=ample and gains and optional > 0)
        blocks = _most(optional, lambda number: fits(Kept(number)))
        if not self.maths.compiled:
            return Kept(blocks)
        mixes = [self._filled(number, fits) for number in range(blocks + 1)]
        return max(mixes, key=lambda kept: self._spared(load, kept))

    def _filled(self, blocks: int, fits: Callable[[Kept], bool]) -> Kept:
        """So many blocks kept, and attention in as many others as fit."""
        return Kept(blocks, _most(self.optional - blocks, lambda number: fits(Kept(blocks, number))))

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

    def buffers_left(self, load: Load, kept: Kept) -> int:
        """Device buffers after a step on such a batch of which so much is kept: more than `buffers`, if smaller batches
        have more, by what backward has freed."""
        own, most = self.buffers(load), self.streamed - min(self.by_size.values(), default=self.swapped)
        if own >= most:
            return own
        tokens, batch = load.tokens, load.batch
        held = recomputed_block(self.maths, tokens, batch)
        pieces = [
            (kept.blocks, kept_block(self.maths, tokens, batch, everything=kept.everything)),
            (kept.attention, held + batch * tokens * attention_per_token(self.maths)),
            (0 if self.offload else self.num_blocks - kept.blocks - kept.attention, held),
        ]
        freed = sum(count * size for count, size in pieces) - max((size for count, size in pieces if count), default=0)
        return min(most, own + freed // block_weights(self.maths.sizes, self.formats))

    def buffers_found(self, load: Load, kept: Kept, before: int) -> int:
        """Of `before` device buffers that the step before has left, those in which such a step finds blocks: as many as
        its own, and those that its forward gives back."""
        passing = passing_bytes(self._peak(load, kept)) // block_weights(self.maths.sizes, self.formats)
        return min(self.buffers(load) + passing, before)

    def seconds(self, load: Load, card: Card, *, kept: Kept, before: int | None = None) -> float:
        """About how long such a step takes, if the step before has left `before` buffers (default: as one like this).

        Copies run beside the computation, but not for longer than it: a block that is streamed has to be there before
        it is computed, and its buffer is free for the next one only afterwards. So the longer of both counts, in
        forward and in backward, for blocks that are computed again and for those that are not. Forward copies what it
        finds missing: what did not fit at the end of the step before, or does not in the beginning. Backward makes
        buffers as it goes; blocks that were driven off before there were as many buffers as blocks left to go are
        copied again.
        """
        streamed, own, left = self.streamed, self.buffers(load), self.buffers_left(load, kept)
        there = streamed - self.buffers_found(load, kept, left if before is None else before)
        again = left - streamed * left // (streamed + left - own) if left > own else 0
        back = streamed - own + again
        kinds: dict[Saved, int] = {
            "everything" if kept.everything else "products": kept.blocks,
            "attention": kept.attention,
            "nothing": self.num_blocks - kept.blocks - kept.attention,
        }
        return sum(
            count * self._block_seconds(load, card, saved, (there, back)) for saved, count in kinds.items() if count
        )

    def _block_seconds(self, load: Load, card: Card, saved: Saved, copies: tuple[int, int]) -> float:
        """Of one block, with its share of what is copied: so many blocks in forward, so many in backward."""
        block = block_weights(self.maths.sizes, self.formats)
        weights_there, weights_back = (count * block // self.num_blocks for count in copies)
        away = self.offload and self.recompute and saved in ("attention", "nothing")
        inputs = recomputed_block(self.maths, load.tokens, load.batch) if away else 0
        forward, backward = (
            work_seconds(card, work, fp8_products=self.fp8_products)
            for work in block_work(
                self.maths,
                load.tokens,
                load.batch,
                saved=saved,
                fp8_products=self.fp8_products,
                transposed=self.transposed_bytes > 0,
            )
        )
        there, back = copy_seconds(card, max(weights_there, inputs)), copy_seconds(card, weights_back + inputs)
        return max(forward, there) + max(backward, back)

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
            # Where they are not added up, batch by batch, autograd adds them to those that are there.
            gradients=(self._copy or (0 if self.accumulates else 4)) * self.trained,
            summed=4 * self.trained if self.accumulates else 0,
        )
        if not self.offload:
            return peak
        away = max(self.num_blocks - number - _OFFLOADED_INPUTS, 0)
        return peak - away * recomputed_block(self.maths, load.tokens, load.batch)

    @property
    def _copy(self) -> int:
        """Bytes of the copy of a trained number, and of its gradient; 0 without copies."""
        return self.maths.compute.itemsize if self.maths.narrow else 0

    def _update(self) -> int:
        """Bytes of gradients, of what an ordinary optimizer computes of them, and of copies; or those of gradients that
        are widened, and their sum."""
        computed = 4 if self.state_bytes > 4 else 0
        copies = 4 + self.state_bytes if self.copied else 0
        widened = self._copy + 4 + (4 if self.accumulates else 0) if self._copy else 0
        return round(max(4 + computed + copies, widened) * self.trained)

    def _spared(self, load: Load, kept: Kept) -> float:
        tokens, batch = load.tokens, load.batch
        held = recomputed_block(self.maths, tokens, batch)
        return time_spared(
            kept.blocks,
            kept.attention,
            products_bytes=kept_block(self.maths, tokens, batch) - held,
            attention_bytes=batch * tokens * attention_per_token(self.maths),
        )


def _most(count: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `count` that fits, if smaller ones do; 0 if none does."""
    return bisect_left(range(1, count + 1), True, key=lambda number: not fits(number))
