"""Errors that users meet.

Each says what is wrong, where, and how to mend it; the command line prints the message without a traceback and leaves
with exit code 2. Anything else that escapes is a fault of the program and keeps its traceback.
"""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager


class UserError(Exception):
    """Something the user can mend. The message is complete: what, where, how."""

    exit_code = 2

    def __init__(self, message: str, parts: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.parts = tuple(parts) or (message,)
        """The problems that the message lists; the message itself if it is about one."""


class ConfigError(UserError):
    """A flag, a TOML key or a prompt file."""


class DataError(UserError):
    """A picture, a clip, a caption or a cache file."""


class CheckpointError(UserError):
    """A model, adapter or state file."""


class MemoryPlanError(UserError):
    """The run does not fit the machine."""


class Problems:
    """Collects everything that is wrong, so that one run shows it all."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def __bool__(self) -> bool:
        return bool(self.messages)

    def add(self, message: str) -> None:
        """Record one problem; the same sentence is kept once."""
        if message not in self.messages:
            self.messages.append(message)

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Record a `UserError` raised inside, problem by problem, instead of letting it pass."""
        try:
            yield
        except UserError as error:
            for part in error.parts:
                self.add(part)

    def raise_all(self, kind: type[UserError] = ConfigError) -> None:
        """Raise one `kind` that lists every problem, if there is any."""
        if len(self.messages) == 1:
            raise kind(self.messages[0])
        if self.messages:
            listed = "\n".join(f"  {number}. {message}" for number, message in enumerate(self.messages, 1))
            raise kind(f"{len(self.messages)} problems:\n{listed}", self.messages)


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate most like `name`, or None if nothing is close."""
    found = difflib.get_close_matches(name.lower(), list(candidates), n=1, cutoff=0.6)
    return found[0] if found else None


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the nearest candidate, or an empty string."""
    found = nearest(name, candidates)
    return f" (did you mean {found!r}?)" if found else ""


def few(names: Sequence[str], shown: int = 4) -> str:
    """`a, b, c, d, …`: enough of a list for a message."""
    return ", ".join(names[:shown]) + (", …" if len(names) > shown else "")
