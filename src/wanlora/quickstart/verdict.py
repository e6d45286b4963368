"""How far the LoRA has brought the pictures from the base's towards the dataset's, measured on pixels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from wanlora.generation.pipeline import Frames
from wanlora.quickstart.comparison import Comparison
from wanlora.quickstart.world import look_score, motion_score

_MEANINGS = {
    "look": "bright paper and black outlines",
    "motion": "aslant up to the right",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure:
    """The mean score of one quality, from 0 (as the base was trained) to 1 (as the dataset is)."""

    name: str
    base: float
    dataset: float
    lora: float

    @property
    def closed(self) -> float:
        """The share of the distance from base to dataset that the LoRA has gone, at most 1."""
        distance = self.dataset - self.base
        return min(1.0, (self.lora - self.base) / distance) if distance else 0.0

    def __str__(self) -> str:
        scores = f"base {self.base:.2f}, dataset {self.dataset:.2f}, LoRA {self.lora:.2f}"
        return f"{self.name} ({_MEANINGS[self.name]}): {scores}: closed {self.closed:.0%} of the distance"


def measures(comparison: Comparison) -> tuple[Measure, ...]:
    """Look over everything drawn, motion over the clips."""
    moving = [index for index, request in enumerate(comparison.requests) if request.pixels.frames > 1]
    everything = list(range(len(comparison.requests)))
    return (
        _measure("look", look_score, comparison, everything),
        _measure("motion", motion_score, comparison, moving),
    )


def verdict(comparison: Comparison) -> tuple[str, ...]:
    """What the page and the console say."""
    count = len(comparison.off)
    same = f"all {count} are the base's again, bit for bit" if comparison.off_equals_base else "NOT the base's pictures"
    return (*map(str, measures(comparison)), f"LoRA off again: {same}")


def _measure(name: str, score: Callable[[Frames], float], comparison: Comparison, rows: Sequence[int]) -> Measure:
    def mean(clips: Sequence[Frames]) -> float:
        return float(np.mean([score(clips[row]) for row in rows]))

    return Measure(
        name=name, base=mean(comparison.base), dataset=mean(comparison.dataset), lora=mean(comparison.trained)
    )
