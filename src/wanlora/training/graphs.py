"""Which passes are replayed as CUDA graphs: those that the card could do faster than the host can queue them.

Small sizes leave the card waiting for the host, which queues thousands of kernels one by one. Every pass is therefore
timed twice, on the host while it is queued and on the card from its first kernel to its last. A card that is done as
soon as the last kernel is queued has been waiting for the host. A size of which that was seen twice in a row, with
nothing streamed, recomputed by a second call or compiled, is recorded (`memory/graphs.py`) and replayed from then on.
In large sizes the card is behind, by a tenth of the pass or more, unless the host has filled the driver's queue, which
holds about a thousand launches: a host that waits for room there takes as long as the card. So sizes that gain nothing
are recorded now and then, which costs nothing either, and the host is free for the passes behind them.

The numbers are those of the pass that was recorded. Inputs are copied into the graph's own; loss and gradient are added
to tensors outside of it; dropout draws from the generator that is seeded before each pass, replayed or not.

Memory: see `memory/graphs.py`. What is computed between passes finds no memory in the passes' pool, so the pool leaves
it as much as it was seen to take, and as much as graphs take outside of the allocator (`Keeping.aside`). Previews and
validation, and passes that run out of memory, get all of it back; sizes that were recorded are recorded anew when they
come again.
"""

import time
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from wanlora.config.train import TrainConfig
from wanlora.foundation.log import say_once, warn_once
from wanlora.foundation.shapes import LatentShape
from wanlora.memory.checkpointing import Recompute
from wanlora.memory.compile import TUNED
from wanlora.memory.graphs import CardGraphs
from wanlora.memory.keeping import Keeping
from wanlora.models.wan.rope import RopeTables
from wanlora.training.build import Trainee
from wanlora.training.flat import FlatGroups
from wanlora.training.objective import Inputs
from wanlora.training.pace import compilations

Pass = Callable[[Inputs], None]
"""Forward and backward of one batch; adds its loss to a tensor that was there before and leaves gradients."""

MOST = 8
"""So many graphs are held at most: the first of a 14B model takes 86 MiB of the card outside of the allocator."""
_MODES = ("default", TUNED, "max-autotune-no-cudagraphs")
"""Of the compiler, which make no graphs themselves."""
_SIGHTINGS = 2
"""A size is recorded after so many passes in a row in which the card waited."""
_BEHIND = 0.05
"""A card that is busy for longer than this part of a pass after the host has queued it is not waiting for the host."""


class PaddedModel(Protocol):
    """What a pass takes from the model beforehand."""

    rope: RopeTables

    def pad_text(self, text: Any, device: torch.device) -> Tensor:
        """Embeddings as one tensor."""


@dataclass(frozen=True, slots=True)
class _Recording:
    """A graph, what it reads, and what it only looks at but must not lose."""

    graph: Any
    inputs: Inputs
    rope: Tensor

    def read(self, inputs: Inputs) -> None:
        """Take new inputs."""
        for field in fields(inputs):
            getattr(self.inputs, field.name).copy_(getattr(inputs, field.name))


@dataclass(frozen=True, slots=True)
class _Watched:
    """A pass that was queued kernel by kernel."""

    key: Hashable
    began: Any
    ended: Any
    seconds: float
    """Of the host."""
    settled: bool
    """Nothing was streamed, recomputed by a second call, or compiled."""


class Replays:
    """Call it for every pass, `passes_queued` and `take_watched` behind all of a step, `settle` after its update.

    `clock` gives seconds.
    """

    def __init__(
        self,
        card: CardGraphs,
        flat: FlatGroups,
        model: PaddedModel,
        recompute: Recompute,
        keeping: Keeping,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.card = card
        self.flat = flat
        self.model = model
        self.recompute = recompute
        self.keeping = keeping
        self.clock = clock
        self.replayed = 0
        """Passes, since the start."""
        self._wanted = True
        self._sightings: Counter[Hashable] = Counter()
        self._recordings: dict[Hashable, _Recording] = {}
        self._watched: list[_Watched] = []
        self._aside = 0

    @property
    def is_open(self) -> bool:
        """Whether memory is held for graphs."""
        return self.card.is_open

    def __call__(self, work: Pass, inputs: Inputs, label: str, *constants: Hashable) -> None:
        """Compute a pass on `inputs`, called `label` in messages; `constants` are what else decides its kernels."""
        inputs = replace(inputs, text=self.model.pad_text(inputs.text, inputs.x0_BCFHW.device))
        rope = self.model.rope.get(LatentShape(*inputs.x0_BCFHW.shape[2:]), inputs.x0_BCFHW.device)
        key = (*(getattr(inputs, field.name).shape for field in fields(inputs)), *constants)
        if key not in self._recordings and self._deserves(key):
            self._record(work, inputs, rope, key, label)
        recording = self._recordings.get(key)
        if recording is None:
            self._watch(work, inputs, key)
            return
        recording.read(inputs)
        self.card.replay(recording.graph)
        self.replayed += 1

    def passes_queued(self) -> None:
        """What is allocated from here on is the update's."""
        if self.keeping.meter:
            self.keeping.meter.reset()

    def settle(self) -> None:
        """The step's update is queued."""
        if self.keeping.meter:
            self._aside = max(self._aside, self.keeping.meter.peak() - self.keeping.meter.allocated())
        self.keeping.aside = self._aside + self.card.outside if self.card.is_open else 0

    def take_watched(self) -> Callable[[], None]:
        """Judges, once the card has passed their marks, the passes that were watched since the last call."""
        watched, self._watched = self._watched, []
        return partial(self._judge, watched)

    def _judge(self, watched: Sequence[_Watched]) -> None:
        for seen in watched:
            taken = self.card.seconds(seen.began, seen.ended)
            waited = seen.settled and taken - seen.seconds < _BEHIND * taken
            self._sightings[seen.key] = self._sightings[seen.key] + 1 if waited else 0

    def release(self) -> None:
        """Give all memory back, between steps; recorded sizes are recorded anew when they come again."""
        self.card.close([recording.graph for recording in self._recordings.values()])
        self._recordings.clear()
        self.flat.add_up(False)
        self.keeping.aside = 0

    def give_up(self) -> None:
        """Give all memory back for good, between steps."""
        self._wanted = False
        self.release()

    def _deserves(self, key: Hashable) -> bool:
        # Blocks may be streamed since it was seen: where memory has run out.
        if not self._wanted or self._sightings[key] < _SIGHTINGS or _streams(self.recompute):
            return False
        if len(self._recordings) >= MOST:
            say_once(
                f"{MOST} passes are replayed as CUDA graphs, no more are kept: further small sizes are slower for it"
            )
        return len(self._recordings) < MOST

    def _record(self, work: Pass, inputs: Inputs, rope: Tensor, key: Hashable, label: str) -> None:
        """Record a pass; one that cannot be recorded is the last that was tried."""
        own = Inputs(**{field.name: getattr(inputs, field.name).clone() for field in fields(inputs)})
        self.flat.add_up(True)
        try:
            graph = self.card.record(partial(work, own))
        except Exception as error:  # whatever it is, seconds are not worth a run
            warn_once(f"no pass is replayed as a CUDA graph, small sizes are slower for it: {error}")
            self._without()
            return
        self._recordings[key] = _Recording(graph, own, rope)
        say_once(f"{label}: the whole pass is replayed as one CUDA graph")

    def _without(self) -> None:
        """Go on in the middle of a step: sums stay, gradients of what was not computed go, and dropout repeats."""
        self._wanted = False
        self.flat.drop()
        self.card.close([recording.graph for recording in self._recordings.values()])
        self._recordings.clear()
        torch.manual_seed(torch.initial_seed())

    def _watch(self, work: Pass, inputs: Inputs, key: Hashable) -> None:
        """Compute a pass kernel by kernel, and time it."""
        before = self._by_the_host()
        began, start = self.card.mark(), self.clock()
        self.card.run(partial(work, inputs))
        seconds, ended = self.clock() - start, self.card.mark()
        self._watched.append(
            _Watched(key, began, ended, seconds, before == self._by_the_host() and not _streams(self.recompute))
        )

    def _by_the_host(self) -> tuple[int, int, int]:
        """Counts what no graph could hold: calls of the host in the middle of backward, and compilations."""
        recompute = self.recompute
        return recompute.recomputed, recompute.attention_kept if recompute.offload else 0, compilations()


def _streams(recompute: Recompute) -> bool:
    """Whether weights change their place during a pass."""
    return recompute.stream is not None and bool(recompute.stream.streamed_indexes)


def choose_replays(
    config: TrainConfig, trainee: Trainee, flat: FlatGroups | None, device: torch.device
) -> Replays | None:
    """What replays passes as CUDA graphs; None where that is not wanted or cannot be, which is said."""
    if config.memory.cuda_graphs == "off":
        return None
    if device.type != "cuda":
        if config.memory.cuda_graphs is not None:
            say_once("--cuda_graphs auto has no effect on a CPU: there is no card that waits for it")
        return None
    mode = config.memory.compile_mode
    obstacles = {
        "blocks are swapped, and their weights lie elsewhere in every pass": _streams(trainee.recompute),
        f"--optimizer_type {config.optimizer.optimizer_type} is given its gradients matrix by matrix": flat is None,
        "float16 changes its loss scale while running": trainee.dtype is torch.float16,
        "module_dropout is drawn by the host": bool(config.network.args.module_dropout),
        f"--compile_mode {mode} may make graphs of its own": mode not in _MODES,
    }
    found = [reason for reason, holds in obstacles.items() if holds]
    if flat is None or found:
        say_once(f"no pass is replayed as a CUDA graph, small sizes are slower for it: {'; '.join(found)}")
        return None
    return Replays(CardGraphs(device), flat, trainee.model, trainee.recompute, trainee.keeping)
