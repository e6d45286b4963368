"""Which of several processes this is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Rank:
    """Process `index` of `count`."""

    index: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.index == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process' part of work that is dealt out in turn."""
        return items[self.index :: self.count]
