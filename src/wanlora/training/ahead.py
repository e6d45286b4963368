"""Queueing steps before the card has done those before.

If the host reads each step's loss before it queues the next step, the card idles while kernels are queued, and a
host that is slower than the card in small sizes never gets time back in large ones. So the host goes on and looks at
a step's numbers one or two steps later. What must not be given up for that: a step whose loss or gradient is not finite
leaves no trace in the weights. When its update is queued nobody knows yet, so the card decides: weights and what the
optimizer remembers are copied before each update, and the copy is put back where the step was not sound. From then on
no step is, so what has been queued meanwhile changes nothing either. What lies on the host (counters, rates) is noted
before each update, and put back by the host when it learns of it.

The copies are there only during an update, when nothing else of a step is. They are put back by kernels that return at
once where the step was sound (`conditional.py`), so what is moved in practice is the copies alone: for a LoRA of rank
32 on the 14B model with an 8-bit optimizer 0.9 GB, read and written.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from wanlora.config.train import TrainConfig
from wanlora.foundation.log import say_once
from wanlora.training.conditional import restore
from wanlora.training.engine import Engine

_AHEAD = 2
"""Steps that are queued before the oldest is read: with small and large sizes mixed, more gain nothing."""
MOST_TENSORS = 64
"""Hundreds of matrices, which optimizers get that may look at shapes, take longer to copy than is gained."""
READ_AT_ONCE = "each step is read before the next is queued, and the card waits for the host in between"
HostState = tuple[list[dict[str, Any]], dict[Any, dict[str, Any]]]
"""Copies of an optimizer's groups and of its states, without what lies on the device."""
_PLAIN = (bool, int, float, str, type(None))


def steps_ahead(config: TrainConfig, engine: Engine) -> int:
    """How many steps are queued before the oldest is read.

    None on a CPU, which has nothing to do in the meantime, where norms of weights are read after each update, and where
    processes exchange the names of what they train on.
    """
    if engine.device.type != "cuda":
        return 0
    obstacles = {
        "--scale_weight_norms reads norms after each update": config.network.scale_weight_norms is not None,
        "processes tell each other what they train on": engine.rank.count > 1,
    }
    found = [reason for reason, holds in obstacles.items() if holds]
    if found:
        say_once(f"{READ_AT_ONCE}: {'; '.join(found)}")
    return 0 if found else _AHEAD


@dataclass(frozen=True, slots=True)
class Reading:
    """Numbers on their way from the device."""

    host: Tensor
    arrived: torch.cuda.Event | None

    @classmethod
    def of(cls, values: Tensor) -> "Reading":
        """Queue the copy of `values`, which may change afterwards."""
        if values.device.type != "cuda":
            return cls(values.clone(), None)
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return cls(host, arrived)

    def get(self) -> list[float]:
        """The numbers. Waits until they are there."""
        if self.arrived is not None:
            self.arrived.synchronize()
        numbers: list[float] = self.host.tolist()
        return numbers


class TakenBack:
    """Updates that leave everything as it was where a step was not sound."""

    def __init__(self, optimizer: Optimizer, parameters: Sequence[Tensor], device: torch.device) -> None:
        self.optimizer = optimizer
        self.parameters = parameters
        self.device = device
        self._sound = torch.ones((), dtype=torch.bool, device=device)
        """All steps so far were; on the device."""

    @property
    def is_possible(self) -> bool:
        """Whether all that an update changes is known and few tensors: not before the optimizer's first, nor for every
        optimizer."""
        remembered = self.optimizer.state
        states = [value for state in remembered.values() for value in state.values()]
        if len(self.parameters) + len(states) > MOST_TENSORS:
            return False
        groups = [value for group in self.optimizer.param_groups for key, value in group.items() if key != "params"]
        tensors = [value for value in states if isinstance(value, Tensor)]
        return (
            len(remembered) == sum(len(group["params"]) for group in self.optimizer.param_groups)
            and all(remembered.values())  # some look for what they remember before there is anything
            and all(isinstance(value, (Tensor, *_PLAIN)) for value in states)
            and not any(self._lies_there(value) for value in groups)
            and not any(getattr(value, "is_paged", False) for value in tensors)
        )

    def copies(self) -> list[Tensor]:
        """Of all that an update changes on the device. Raises torch's error if its memory does not suffice."""
        return [tensor.detach().clone() for tensor in self._on_device()]

    def update(self, update: Callable[[], None], numbers: Tensor, before: Sequence[Tensor]) -> HostState:
        """Call `update`, without effect on the device unless `numbers` are finite and all before them were.

        `before` are the `copies` of this moment. Returns what `put_back` needs.
        """
        host_state = self._host_state()
        with torch.no_grad():
            self._sound.logical_and_(numbers.isfinite().all())
            update()
            for tensor, former in zip(self._on_device(), before, strict=True):
                restore(self._sound, tensor, former)
        return host_state

    def put_back(self, host_state: HostState) -> None:
        """Undo on the host what updates did that were without effect on the device."""
        groups, states = host_state
        for group, former in zip(self.optimizer.param_groups, groups, strict=True):
            group.update(former)
        for parameter, former in states.items():
            self.optimizer.state[parameter].update(former)

    def _on_device(self) -> Iterator[Tensor]:
        """All tensors that an update changes, in a fixed order."""
        yield from self.parameters
        for state in self.optimizer.state.values():
            yield from (value for value in state.values() if self._lies_there(value))

    def _host_state(self) -> HostState:
        groups = [
            {key: _copied(value) for key, value in group.items() if key != "params"}
            for group in self.optimizer.param_groups
        ]
        states = {
            parameter: {key: _copied(value) for key, value in state.items() if not self._lies_there(value)}
            for parameter, state in self.optimizer.state.items()
        }
        return groups, states

    def _lies_there(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.device.type == self.device.type


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
