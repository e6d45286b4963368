"""Where the time of a start goes, in one line.

Between the command and the first step lie imports, checks, a checkpoint of many gigabytes and more, in rooms that know
nothing of each other. Each ends a part with `start.lap(name)`: the time since the lap before counts under that name.
What took long within a lap may be named too, with `start.part(name)`.
There is one `start`, as there is one log, because a process starts one run at a time. It begins when the package is
imported; work that a card was given and has not finished counts where somebody waits for it.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

import wanlora

_LEAST = 0.05
"""Parts of fewer seconds are not worth a word."""


class Laps:
    """Seconds by part, from `began` on (of `clock`)."""

    def __init__(self, began: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._began = self._last = began
        self._seconds: dict[str, float] = {}
        self._parts: dict[str, float] = {}
        self._within: dict[str, str] = {}
        self._over = False

    def begin(self) -> None:
        """Begin anew if the start before is over: a process may train more than once."""
        if self._over:
            self._began = self._last = self._clock()
            self._seconds.clear()
            self._within.clear()
            self._over = False

    def lap(self, name: str) -> None:
        """Count the time since the last lap under `name`, once more if it has been there before."""
        now = self._clock()
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._last
        self._last = now
        parts, self._parts = _listed(self._parts), {}
        if parts:
            self._within[name] = f" ({parts})"

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Name what is done within as a part of the next lap."""
        began = self._clock()
        try:
            yield
        finally:
            self._parts[name] = self._parts.get(name, 0.0) + self._clock() - began

    def finish(self) -> str:
        """The start is over: how long it took, and its parts in their order."""
        self._over = True
        return f"start: {self._last - self._began:.1f} s: {_listed(self._seconds, self._within)}"


def _listed(seconds: Mapping[str, float], within: Mapping[str, str] = MappingProxyType({})) -> str:
    parts = [f"{name} {part:.1f}{within.get(name, '')}" for name, part in seconds.items() if part >= _LEAST]
    return ", ".join(parts)


start = Laps(wanlora.STARTED)
