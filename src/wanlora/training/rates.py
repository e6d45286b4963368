"""Applying a learning-rate schedule to an optimizer."""

import importlib
import inspect
from typing import Any, Protocol

from torch.optim import Optimizer

from wanlora.foundation.errors import ConfigError
from wanlora.training.schedules import Factor


class Rates(Protocol):
    """Sets the learning rates before each optimizer step."""

    def before(self, step: int) -> None:
        """Set the rates of step `step`, counted from 0."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides its step."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""


class PureRates:
    """A schedule that is a function of the step: nothing to save."""

    def __init__(self, optimizer: Optimizer, factor: Factor) -> None:
        self.optimizer = optimizer
        self.factor = factor
        self.base = [group["lr"] for group in optimizer.param_groups]

    def before(self, step: int) -> None:
        """Set the rates of step `step`."""
        for group, base in zip(self.optimizer.param_groups, self.base, strict=True):
            if base is not None:
                group["lr"] = base * self.factor(step)

    def state_dict(self) -> dict[str, Any]:
        """Empty: the step says it all."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Refuse the state of another kind of schedule."""
        if state:
            raise ConfigError("the saved state used a custom --lr_scheduler_type; give the same one to resume")


class ForeignRates:
    """A scheduler class of somebody else's, given by its dotted path."""

    def __init__(self, optimizer: Optimizer, path: str, arguments: dict[str, Any]) -> None:
        module_name, _, class_name = path.rpartition(".")
        try:
            scheduler_class = getattr(importlib.import_module(module_name or "torch.optim.lr_scheduler"), class_name)
            self.scheduler = scheduler_class(optimizer, **arguments)
            inspect.signature(self.scheduler.step).bind()  # some want to be told a loss at each step
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            given = " ".join(f"{key}={value}" for key, value in arguments.items()) or "(none given)"
            raise ConfigError(
                f"--lr_scheduler_type {path} cannot be used ({error}); check the name and --lr_scheduler_args {given}"
            ) from error

    def before(self, step: int) -> None:
        """Advance the scheduler, except before the first step, whose rates it set when it was made."""
        if step > 0:
            self.scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        """The scheduler's own state."""
        state: dict[str, Any] = self.scheduler.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Give the scheduler its state back."""
        self.scheduler.load_state_dict(state)
