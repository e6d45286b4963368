"""Which stretches of a clip are trained: pure functions of the number of frames.

A window is a run of consecutive frames. Each target length asks for some windows; a clip that is too short yields
fewer, or the same one several times. Files and epochs count a window once, and `Extraction.shortfall` says in words
what a clip does not yield, so that nobody has to find out by counting samples.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from wanlora.foundation.registry import Registry
from wanlora.foundation.shapes import floor_to_latent_frames


@dataclass(frozen=True, slots=True, order=True)
class Window:
    """`frames` consecutive frames beginning with frame `start`."""

    start: int
    frames: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Extraction:
    """How windows are cut from a clip; the fields are the TOML keys of the same meaning."""

    mode: str = "head"
    """A name in `EXTRACTIONS`."""
    targets: tuple[int, ...] = (1,)
    """Window lengths in frames, ascending, each 4k + 1; `full` ignores them."""
    stride: int = 1
    """Frames between the starts of two windows; `slide` only."""
    sample: int = 1
    """Windows per target; `uniform` only."""
    max_frames: int = 129
    """The longest window; `full` only."""

    def windows(self, num_frames: int) -> tuple[Window, ...]:
        """Every window of a clip of `num_frames`, by target and then by start, repeats included."""
        return tuple(EXTRACTIONS.get(self.mode)(num_frames, self))

    def distinct(self, num_frames: int) -> tuple[Window, ...]:
        """The windows that are trained: each once."""
        return tuple(dict.fromkeys(self.windows(num_frames)))

    def could_yield(self, window: Window) -> bool:
        """Whether some clip has this window."""
        if self.mode == "full":
            return window.start == 0 and window.frames <= self.max_frames
        spacing = {"chunk": window.frames, "slide": self.stride, "uniform": 1}.get(self.mode)
        well_placed = window.start == 0 if spacing is None else window.start % spacing == 0
        return window.frames in self.targets and well_placed

    def shortfall(self, num_frames: int) -> "Lack | None":
        """What a clip of `num_frames` yields less than asked, or None if it yields everything."""
        if self.mode == "full":
            return None
        per_target = self.sample if self.mode == "uniform" else 1
        found = [window.frames for window in self.distinct(num_frames)]
        got = [min(found.count(target), per_target) for target in self.targets]
        reasons = [
            _reason(num_frames, target, yielded)
            for target, yielded in zip(self.targets, got, strict=True)
            if yielded < per_target
        ]
        if not reasons:
            return None
        return Lack(asked=per_target * len(self.targets), got=sum(got), reason="; ".join(reasons))


@dataclass(frozen=True, kw_only=True, slots=True)
class Lack:
    """A clip that yields fewer distinct windows than asked."""

    asked: int
    got: int
    reason: str


EXTRACTIONS: Registry[Callable[[int, Extraction], Iterator[Window]]] = Registry("frame_extraction")


@EXTRACTIONS.register("head")
def head(num_frames: int, extraction: Extraction) -> Iterator[Window]:
    """The first frames."""
    for target in extraction.targets:
        if num_frames >= target:
            yield Window(0, target)


@EXTRACTIONS.register("chunk")
def chunk(num_frames: int, extraction: Extraction) -> Iterator[Window]:
    """Side by side; what remains at the end is left out."""
    for target in extraction.targets:
        for start in range(0, num_frames - target + 1, target):
            yield Window(start, target)


@EXTRACTIONS.register("slide")
def slide(num_frames: int, extraction: Extraction) -> Iterator[Window]:
    """A new window every `stride` frames."""
    for target in extraction.targets:
        for start in range(0, num_frames - target + 1, extraction.stride):
            yield Window(start, target)


@EXTRACTIONS.register("uniform")
def uniform(num_frames: int, extraction: Extraction) -> Iterator[Window]:
    """`sample` windows spread evenly from the first frame to the last; they may coincide."""
    for target in extraction.targets:
        if num_frames >= target:
            for start in np.linspace(0, num_frames - target, extraction.sample).astype(int):
                yield Window(int(start), target)


@EXTRACTIONS.register("full")
def full(num_frames: int, extraction: Extraction) -> Iterator[Window]:
    """The whole clip up to `max_frames`, shortened to 4k + 1."""
    yield Window(0, floor_to_latent_frames(min(num_frames, extraction.max_frames)))


def _reason(num_frames: int, target: int, yielded: int) -> str:
    if yielded == 0:
        return f"shorter than the {target} frames asked for"
    windows = "window" if yielded == 1 else "windows"
    return f"only {yielded} distinct {windows} of {target} frames in {num_frames}"
