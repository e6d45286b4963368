"""CUDA graphs of whole passes, and memory that they share with passes that are none.

A forward and backward pass is thousands of kernels, and where each is small the host, which queues them one by one, is
slower than the card. A graph is the list of them, recorded once and queued as one.

What a graph computes with lies at fixed addresses. Memory of its own would be lost to all other passes, and large sizes
need every byte. So there is one pool, and every pass, recorded or not, takes its memory from there: a graph's memory is
free in the pool when the recording ends, other passes use it in between, and the graph writes over it again. That is
sound under one condition, which whoever calls `run` and `record` must keep:

    nothing that a pass allocates may be needed after the pass.

Results are therefore added to tensors made before, outside; tables that a model keeps are made before, outside, and
held by whoever holds the graph. Workspaces of libraries may lie in the pool, since their content matters only within a
call, and so may the state of compilers, which are done before the pool is opened.

Blocks of the allocator belong to a stream, so all passes run on one stream of their own, between waiting for the
current stream and being waited for by it. `use_mem_pool` routes what one thread allocates, so backward stays in the
calling thread. Until the first graph is recorded there is no pool, and passes run as if this module did not exist.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from wanlora.foundation.garbage import return_memory
from wanlora.memory.marks import CardMarks

Work = Callable[[], None]


class CardGraphs(CardMarks):
    """Records and replays work on one card, and marks moments in it."""

    def __init__(self, device: torch.device) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self.outside = 0
        """Bytes of the card that graphs have taken outside of the allocator; the driver keeps them for the next."""
        self._pool: torch.cuda.MemPool | None = None
        self._stream: torch.cuda.Stream | None = None
        """The same for good: for each that it meets cuBLAS keeps workspaces, 64 MiB on an H100."""

    @property
    def is_open(self) -> bool:
        """Whether passes share a pool."""
        return self._pool is not None

    def run(self, work: Work) -> None:
        """Queue `work`, from the pool if there is one."""
        if self._pool is None:
            work()
            return
        with self._beside(), torch.cuda.use_mem_pool(self._pool, self.device):
            work()

    def record(self, work: Work) -> torch.cuda.CUDAGraph:
        """A graph of `work`, which is not computed. After an error the card is as if nothing had been tried."""
        if self._pool is None:
            self._stream = self._stream or torch.cuda.Stream(self.device)
            self._pool = torch.cuda.MemPool()
        graph, before = torch.cuda.CUDAGraph(), self._taken_outside()
        try:
            with self._beside():
                pool: Any = self._pool.id
                with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
                    work()
        except BaseException:
            self._recover()
            raise
        self.outside += max(self._taken_outside() - before, 0)
        return graph

    def replay(self, graph: torch.cuda.CUDAGraph) -> None:
        """Queue what was recorded. Random numbers go on from where the card's generator stands."""
        with self._beside():
            graph.replay()

    def close(self, graphs: Iterable[torch.cuda.CUDAGraph]) -> None:
        """Give the pool back, with all graphs that were recorded in it."""
        if self._pool is None:
            return
        torch.cuda.synchronize(self.device)
        for graph in graphs:
            graph.reset()
        self._pool = None
        return_memory(self.device)

    def _taken_outside(self) -> int:
        """Bytes of the card that all programs have taken, but for this one's allocator."""
        free, total = torch.cuda.mem_get_info(self.device)
        return total - free - torch.cuda.memory_reserved(self.device)

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """On the passes' own stream, backward in this thread."""
        assert self._stream is not None
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream), torch.autograd.set_multithreading_enabled(False):
                yield
        finally:
            current.wait_stream(self._stream)

    def _recover(self) -> None:
        """End what a recording that failed has left begun: the routing of memory and the generator's recording."""
        assert self._pool is not None
        with suppress(RuntimeError):  # it had been ended
            torch._C._cuda_endAllocateToPool(self.device.index, self._pool.id)
        generator = torch.cuda.default_generators[self.device.index]
        generator.graphsafe_set_state(torch.Generator(self.device).graphsafe_get_state())
