"""A card that is none, for passes that may be replayed."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

AT_ONCE, BEHIND = 0.101, 0.15
"""Seconds of the card for a pass that takes the host 0.1."""


@dataclass
class Card:
    """A card that computes when it is asked to; recording computes nothing, as on a real one."""

    behind: dict[int, float] = field(default_factory=dict)
    """The card's seconds by the number of a pass that was queued; `AT_ONCE` otherwise."""
    fails: bool = False
    is_open: bool = False
    outside: int = 5
    queued: int = 0
    recorded: int = 0
    closed: int = 0

    def mark(self) -> int:
        return self.queued

    def seconds(self, began: int, ended: int) -> float:
        return self.behind.get(began, AT_ONCE)

    def run(self, work: Callable[[], None]) -> None:
        self.queued += 1
        work()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        self.is_open = True
        self.recorded += 1
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        return work

    def replay(self, graph: Callable[[], None]) -> None:
        graph()

    def close(self, graphs: Iterable[Callable[[], None]]) -> None:
        self.closed += self.is_open
        self.is_open = False
