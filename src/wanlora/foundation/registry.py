"""Things a user chooses by name: samplers, solvers, optimizers, kernels."""

from collections.abc import Callable
from typing import Generic, TypeVar

from wanlora.foundation.errors import ConfigError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """Maps names to values of one kind; an unknown name is the user's error and is answered with the nearest."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Every registered name, aliases included, in order of registration."""
        return tuple(self._entries)

    def register(self, *names: str) -> Callable[[T], T]:
        """Decorator: make the decorated thing known under `names`."""

        def add(entry: T) -> T:
            for name in names:
                if name in self._entries:
                    raise ValueError(f"{self.kind} {name!r} is registered twice")
                self._entries[name] = entry
            return entry

        return add

    def get(self, name: str) -> T:
        """The entry called `name`. Raises `ConfigError` naming the nearest and all known ones."""
        if name not in self._entries:
            known = ", ".join(self._entries)
            raise ConfigError(f"unknown {self.kind} {name!r}{did_you_mean(name, self._entries)}; known: {known}")
        return self._entries[name]
