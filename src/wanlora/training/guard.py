"""What stands between a pass that runs out of memory and the end of a run.

Every forward and backward pass of a step runs under the guard. It measures what the pass needed (`memory/keeping.py`
decides by that how many blocks are recomputed), and when memory runs out it makes room and runs the passes of the step
again from the beginning: first without the transposed copies of fp8 weights, if there are any, and without buffers that
go while forward computes, if some were left, then with everything recomputed, then without the streamed blocks that
stay on the card for small batches (`memory/residency.py`), then with more blocks streamed from the host. What the
failed attempt left is dropped, and dropout repeats, so the run is the same as if nothing had happened, and it goes on
with the room it has made. Processes of a run on several cards do this each for itself: it ends before they exchange
gradients.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import torch

from wanlora.data.dataset import Batch
from wanlora.foundation.garbage import return_memory
from wanlora.foundation.log import log
from wanlora.foundation.shapes import LatentShape
from wanlora.memory.checkpointing import Kept, Recompute
from wanlora.memory.host import available_host_memory
from wanlora.memory.keeping import Keeping
from wanlora.memory.masters import frozen_tensors
from wanlora.memory.measure import GIB, MemoryFigures, is_out_of_memory, memory_figures
from wanlora.memory.outlook import Load
from wanlora.memory.refilling import FreedMemory
from wanlora.memory.residency import Residency
from wanlora.memory.streaming import BlockStream
from wanlora.quantization.transposed import TransposedWeights

Result = TypeVar("Result")
Relief = Callable[[], None]
"""Makes room; to be called once what the failed pass held is gone."""

_STREAMED_AT_A_TIME = 8
"""One in so many blocks is streamed more each time that memory runs out."""
_USABLE_HOST_MEMORY = 0.8
"""The part of the free system memory that is taken for this."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Working:
    """What is being computed, for messages."""

    bucket: str
    names: tuple[str, ...] = ()
    num_tokens: int = 0


class Spare(Protocol):
    """Memory that only makes steps faster."""

    @property
    def is_open(self) -> bool:
        """Whether there is any."""

    def give_up(self) -> None:
        """Give it back for good."""


class MemoryGuard:
    """Runs passes. With `retry` it makes room when memory runs out; without, the error passes through."""

    def __init__(
        self,
        device: torch.device,
        *,
        keeping: Keeping | None = None,
        recompute: Recompute | None = None,
        stream: BlockStream | None = None,
        by_size: Mapping[Load, int] | None = None,
        retry: bool = False,
    ) -> None:
        """`by_size` are numbers of swapped blocks for sizes that have their own."""
        self.device = device
        self.keeping = keeping or Keeping(0, 0)
        self.recompute = recompute
        self.stream = stream
        self.residency = Residency(stream, by_size or {}) if stream else None
        self.retry = retry
        self.retried = False
        """Memory ran out in the last step, and was made."""
        self.spare: Spare | None = None
        """Given back before anything else is done."""
        self.transposed = TransposedWeights(())
        """Copies that are dropped before anything is done that costs more."""
        self.working = Working(bucket="the model")
        self._loads: list[Load] = []
        self._left = 0
        """Passes of the step that have not begun."""
        self.figures: MemoryFigures | None = None
        """As they were when memory ran out and nothing was left to be done."""

    @property
    def kept(self) -> Kept:
        """What was kept in the pass at hand."""
        return self.keeping.kept

    @property
    def buffers(self) -> int:
        """Device buffers of streamed blocks in the step at hand, while it needs most memory."""
        return self.residency.buffers if self.residency else 0

    def run(self, passes: Callable[[], Result], drop: Callable[[], None], batches: Sequence[Batch] = ()) -> Result:
        """What `passes` over `batches` returns, which must repeat exactly; `drop` undoes what an attempt that failed
        has left."""
        self._loads, self.retried = [load_of(batch) for batch in batches], False
        while True:
            self._resize()
            self._left = len(batches)
            try:
                with self.keeping.step(passing=self.residency.passing if self.residency else 0):
                    result = passes()
                if self.residency:
                    self.residency.note(self._loads, self.keeping.need)
                return result
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                figures = memory_figures(self.device)
                relief = self._spare_relief() or (self._relief() if self.retry else None)
                if relief is None:
                    self.figures = figures
                    raise
            # The tensors of the failed attempt hang on the error, which is gone only here.
            drop()
            self._clean()
            relief()
            self.retried = True

    def _resize(self) -> None:
        """Let as many streamed blocks stay on the card as the step's sizes leave room for."""
        if self.residency and self.residency.prepare(self._loads) and self.keeping.meter:
            self.keeping.meter.take_highest()  # what stayed there until now is not the step's

    def make_room(self) -> None:
        """Give back, between steps, what streamed blocks take that need not stay on the card."""
        if self.residency:
            self.residency.shrink()

    @contextmanager
    def batch(self, batch: Batch) -> Iterator[None]:
        """Around the forward and backward pass of one batch."""
        load = load_of(batch)
        self.working = Working(bucket=bucket_name(batch), names=batch.names, num_tokens=load.tokens * load.batch)
        self._left -= 1
        if self._left == 0 and self.residency and self.keeping.meter:
            self.residency.refill(FreedMemory(self.keeping.meter.allocated))
        with self.keeping.batch(self.working.bucket):
            yield

    def _spare_relief(self) -> Relief | None:
        return partial(self._give_spare, self.spare) if self.spare and self.spare.is_open else None

    def _give_spare(self, spare: Spare) -> None:
        spare.give_up()
        self._say("no pass is replayed as a CUDA graph")

    def _relief(self) -> Relief | None:
        """The cheapest way to make room that is left."""
        if self.transposed.are_kept:
            return self._drop_transposed
        if self.residency and self.residency.stop_passing():
            return partial(self._say, "buffers of swapped blocks are given back before a forward and not within it")
        given_up = self.keeping.give_up()
        if given_up.blocks:
            return partial(self._say, f"{given_up.blocks} blocks that kept what they computed are recomputed")
        if given_up.attention:
            return partial(self._say, "blocks that kept the result of attention are recomputed as a whole")
        if self.residency and (more := self.residency.give_up(self._loads)):
            return partial(self._say, f"{more} blocks that stayed on the card for batches of this size are swapped")
        stream, recompute = self.stream, self.recompute
        if stream is None or recompute is None or stream.num_resident == 0:
            return None
        count = max(len(stream.blocks) // _STREAMED_AT_A_TIME, 1)
        if not stream.streamed_indexes:
            count += stream.base_ring  # so many buffers on the card come with the first streamed blocks
        return partial(self._stream_more, stream, recompute, count) if host_can_take(stream, count) else None

    def _drop_transposed(self) -> None:
        size = self.transposed.num_bytes / GIB
        self.transposed.drop()
        self._say(f"weights are transposed where backward needs them, which frees {size:.1f} GiB,")

    def _stream_more(self, stream: BlockStream, recompute: Recompute, count: int) -> None:
        more = stream.stream_more(count)
        recompute.refresh()
        self.keeping.allow(len(recompute.optional))
        swapped = len(stream.streamed_indexes) - stream.base_ring
        self._say(f"{more} blocks more wait in system memory until they are due, as with --blocks_to_swap {swapped},")

    def _say(self, relief: str) -> None:
        log.warning(
            f"the card's memory did not suffice for {describe(self.working)}: {relief} from now on, and the step is "
            "computed again; nothing is lost (--on_oom stop ends the run instead)"
        )

    def _clean(self) -> None:
        """Return the memory of the failed attempt."""
        if self.stream is not None:
            self.stream.reset()
        return_memory(self.device)


def bucket_name(batch: Batch) -> str:
    """`768x416x21`, or `768x416x1 x 4` for a batch of four."""
    size = len(batch.names)
    return f"{batch.pixels} x {size}" if size > 1 else str(batch.pixels)


def load_of(batch: Batch) -> Load:
    """What decides its memory."""
    return Load(tokens=LatentShape.of(batch.pixels).num_tokens, batch=len(batch.names))


def describe(working: Working) -> str:
    """`768x416x21 (7488 tokens)`."""
    return f"{working.bucket} ({working.num_tokens} tokens)" if working.num_tokens else working.bucket


def host_can_take(stream: BlockStream, count: int) -> bool:
    """Whether the system has memory for `count` more blocks; it is said if not."""
    block = sum(tensor.numel() * tensor.element_size() for tensor in frozen_tensors(stream.blocks[0]))
    free = available_host_memory()
    if free is None or count * block < _USABLE_HOST_MEMORY * free:
        return True
    log.warning(
        f"{count} more blocks of {block / GIB:.2f} GiB cannot wait in system memory: {free / GIB:.1f} GiB of it is free"
    )
    return False
