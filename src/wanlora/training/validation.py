"""The loss on samples that are never trained on, taken in the same way every time.

The loss of a step says little: it depends on the samples and noise levels that were drawn more than on the adapter.
Here all that is fixed. Every sample of the dataset file's `[[validation]]` gets a noise of its own at each of a few
noise levels, spread over the law that training draws from, so the mean estimates the very loss that training lowers, on
other samples. Noise and levels depend on the name of the sample and on nothing else, not even on --seed: values can be
compared from step to step, between runs with the same noise level flags, and with the base model's own.

Validation borrows the model: adapters' dropout is off, the optimizer shows the weights that would be saved, no random
generator is touched. One that fails is reported and training goes on.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.optim import Optimizer

from wanlora.config.outputs import ValidationConfig
from wanlora.data.dataset import CachedBatches
from wanlora.data.order import BatchSpec, fixed_batches
from wanlora.data.plan import DataPlan
from wanlora.data.sources import some
from wanlora.diffusion.timesteps import TimestepPlan
from wanlora.foundation.log import log
from wanlora.foundation.random import Streams
from wanlora.foundation.shapes import LatentShape
from wanlora.generation.pipeline import evaluating
from wanlora.lora.network import LoRANetwork
from wanlora.memory.streaming import BlockStream
from wanlora.training.engine import Engine
from wanlora.training.metrics import VALIDATION_LOSS, Metrics
from wanlora.training.objective import FlowObjective, Noising
from wanlora.training.optimizers import set_mode
from wanlora.training.position import Position
from wanlora.training.state import ValidationStanding
from wanlora.training.step import is_finite

BASE_LOSS = "loss/validation_base"
_STREAMS = Streams(0)
"""The same in every run."""


class ValidationSet:
    """The samples, and the noise and noise levels that belong to each."""

    def __init__(self, plan: DataPlan, timesteps: TimestepPlan, weighting: str, *, num_levels: int) -> None:
        self.names = tuple(item.name for item in plan.items)
        self.batches = fixed_batches(plan)
        self.data = CachedBatches.of(plan)
        self.timesteps = timesteps
        self.num_levels = num_levels
        law = replace(timesteps, num_buckets=None)
        samples = [f"{item.name} {item.pixels}" for item in plan.items]
        text = "\n".join([*samples, str(num_levels), repr(law), weighting])
        self.key = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        """Values of two sets can be compared if their keys are equal."""

    def noising(self, latents_BCFHW: Tensor, names: Sequence[str], level: int) -> Noising:
        """The noise and the noise level of each sample of a batch at level number `level`.

        The k-th of K levels is drawn from the k-th of K equally likely parts of the law.
        """
        shape, latent = latents_BCFHW.shape[1:], LatentShape(*latents_BCFHW.shape[2:])
        noise = [torch.randn(shape, generator=_STREAMS.generator(f"validation noise {name}", level)) for name in names]
        within = [
            torch.rand((), generator=_STREAMS.generator(f"validation level {name}", level), dtype=torch.float64)
            for name in names
        ]
        u_B = (level + torch.stack(within)) / self.num_levels
        return Noising(torch.stack(noise), self.timesteps.draw(len(names), latent, u_B=u_B))


@dataclass(frozen=True, slots=True)
class _Losses:
    """The loss of samples by (sample, level)."""

    values: Mapping[tuple[int, int], float]

    @property
    def mean(self) -> float:
        """Over all, summed exactly, so that the order in which they were taken does not matter."""
        return math.fsum(self.values.values()) / len(self.values)

    @property
    def broken(self) -> list[int]:
        """Samples whose loss is not a finite number."""
        return sorted({sample for (sample, _), value in self.values.items() if not is_finite(value)})


class Validation:
    """Measures when it is due; without samples it does nothing."""

    def __init__(
        self,
        config: ValidationConfig,
        samples: ValidationSet | None,
        *,
        objective: FlowObjective,
        network: LoRANetwork,
        stream: BlockStream | None,
        optimizer: Optimizer,
        engine: Engine,
        metrics: Metrics,
        standing: ValidationStanding | None,
        make_room: Callable[[], None] = lambda: None,
    ) -> None:
        """`make_room` is called before anything is measured."""
        self.config = config
        self.samples = samples
        self.objective = objective
        self.network = network
        self.stream = stream
        self.optimizer = optimizer
        self.engine = engine
        self.metrics = metrics
        self.make_room = make_room
        self.standing = standing
        """What was measured so far; saved with the state."""

    def at_first(self, position: Position) -> None:
        """Before the first step of a run, and of a resumed one whose values cannot be compared with the new ones."""
        if self.samples is None or (self.standing and self.standing.key == self.samples.key):
            return
        if self.standing:
            log.info("validation: samples or noise levels are not those of the resumed run; base and best begin anew")
        self.standing = ValidationStanding(key=self.samples.key)
        loss = self._measure(self.samples, position)
        if loss is None:
            return
        untrained = not any(bool(weights.up.any()) for weights in self.network.weights().values())
        with self.network.enabled(False):
            base = loss if untrained else self._measure(self.samples, position)
        self.standing = replace(self.standing, base=base if base is not None and is_finite(base) else None)
        self._take(loss, position, {} if base is None else {BASE_LOSS: base})

    def is_due(self, position: Position, *, epoch_ended: bool) -> bool:
        """Whether the loss is measured after the step that led to `position`, which is not the last."""
        every_steps, every_epochs = self.config.validate_every_n_steps, self.config.epochs_between
        due = bool(every_steps and position.step % every_steps == 0)
        due |= bool(epoch_ended and every_epochs and position.epoch % every_epochs == 0)
        return self.samples is not None and due

    def when_due(self, position: Position, *, epoch_ended: bool, ends: bool) -> None:
        """After a step: once, also when a step, an epoch and the end (`ends`) fall due together."""
        if self.samples is not None and (ends or self.is_due(position, epoch_ended=epoch_ended)):
            loss = self._measure(self.samples, position)
            if loss is not None:
                self._take(loss, position, {})

    def _take(self, loss: float, position: Position, more: Mapping[str, float]) -> None:
        """Log a value and what it is to be compared with."""
        assert self.standing is not None
        best = self.standing.best
        if is_finite(loss) and (best is None or loss < best):
            self.standing = replace(self.standing, best=loss, best_step=position.step)
        self.metrics.record_validation({VALIDATION_LOSS: loss, **more}, position)
        if is_finite(loss):
            log.info(_line(loss, self.standing))

    def _measure(self, samples: ValidationSet, position: Position) -> float | None:
        """The mean loss over all processes; None if some of it could not be measured, which is said."""
        mine: dict[tuple[int, int], float] = {}
        failure = None
        try:
            with self._borrowed():
                for batch in self.engine.rank.share(samples.batches):
                    mine |= self._losses(samples, batch)
        except Exception as error:  # whatever it is, a number is not worth a run
            failure = str(error)
            if self.stream is not None:
                self.stream.reset()
        parts = self.engine.gather_objects((mine, failure))
        for _, reason in parts:
            if reason is not None:
                log.warning(f"validation at step {position.step} failed and is left out; training goes on: {reason}")
                return None
        losses = _Losses({place: value for part, _ in parts for place, value in part.items()})
        if losses.broken:
            names = some([samples.names[sample] for sample in losses.broken])
            log.warning(
                f"validation: the loss at step {position.step} is not a finite number for {names}; training goes on"
            )
        return losses.mean

    def _losses(self, samples: ValidationSet, spec: BatchSpec) -> dict[tuple[int, int], float]:
        """Of every sample of a batch at every level."""
        batch = samples.data[spec]
        levels = range(samples.num_levels)
        noisings = (samples.noising(batch.latents_BCFHW, batch.names, level) for level in levels)
        by_level = [self.objective.losses(batch, noising).tolist() for noising in noisings]
        return {
            (sample, level): value
            for level, losses in zip(levels, by_level, strict=True)
            for sample, value in zip(spec.indexes, losses, strict=True)
        }

    @contextmanager
    def _borrowed(self) -> Iterator[None]:
        """Model and optimizer as they are when a LoRA is used; afterwards as they were."""
        set_mode(self.optimizer, training=False)
        self.make_room()
        try:
            # not inference mode: tables that a model builds and keeps here must serve training as well
            with torch.no_grad(), evaluating(self.network.model):
                yield
        finally:
            set_mode(self.optimizer, training=True)


def _line(loss: float, standing: ValidationStanding) -> str:
    """`validation: 0.1234 (base 0.1300, best 0.1200 at step 200)`."""
    base = "" if standing.base is None else f"base {standing.base:.4f}, "
    return f"validation: {loss:.4f} ({base}best {standing.best:.4f} at step {standing.best_step})"
