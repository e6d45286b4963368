"""Which source frame is shown at each moment of the model's 16 frames a second.

Wan learns motion at a fixed rate, so a 30 fps clip taken frame by frame teaches slow motion. The usual trainer never
looks at the rate in the file. Here frames are chosen by their timestamps, which is right for files of variable rate
too; a file whose frames would all be chosen once is taken as it stands. `source_fps` overrides the file's timestamps
and keeps the accumulator by which existing caches were made; `target_fps = "keep"` takes every frame.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

MODEL_FPS = 16.0
"""Frames a second that Wan 2.1 and the 14B models of Wan 2.2 are trained at."""
TargetFps = float | Literal["keep"] | None
_SLACK = 0.05
"""Share of an output frame by which a duration may be wrong: Matroska stores milliseconds."""
_ROUNDING = 0.002
"""Seconds by which a frame may be stamped late, for the same reason."""
_SAME_RATE = 0.005
"""Relative difference below which two rates are one: 16 and 16000/1001."""


@dataclass(frozen=True, slots=True)
class Resampling:
    """The source frame shown at each output frame, and why."""

    indexes: tuple[int, ...]
    """Indexes of source frames, ascending; one may repeat."""
    rule: str = ""
    """What cache files record: empty when the frames are taken as they stand."""
    note: str = ""
    """What the user is told: empty when there is nothing to tell."""


def resample(
    times: Sequence[float], *, rate: float, source_fps: float | None = None, target_fps: TargetFps = None
) -> Resampling:
    """The frames to train of a clip whose frames are shown at `times` (seconds, ascending).

    `rate` is the clip's own average rate; it gives the last frame its duration and is named to the user.
    """
    as_they_stand = tuple(range(len(times)))
    if target_fps == "keep":
        return Resampling(as_they_stand)
    target = target_fps or MODEL_FPS
    if source_fps is not None:
        return _declared(len(times), source_fps, target)
    indexes = shown_at(times, rate, target)
    if indexes == as_they_stand or _runs_at(times, rate, target):
        return Resampling(as_they_stand)
    rule = f"by time to {target:g} fps"
    return Resampling(
        indexes,
        rule,
        f'{fps_text(rate)} fps, resampled to {target:g} by timestamps; target_fps = "keep" would take every frame',
    )


def accumulated(num_frames: int, source_fps: float, target_fps: float) -> tuple[int, ...]:
    """Frames kept of a faster clip: those at which a running sum of target / source passes a whole number."""
    kept, position, last = [], 0.0, -1
    for index in range(num_frames):
        if int(position) != last:
            kept.append(index)
            last = int(position)
        position += target_fps / source_fps
    return tuple(kept)


def shown_at(times: Sequence[float], rate: float, target_fps: float) -> tuple[int, ...]:
    """For every k, while the clip lasts, the frame that a player shows at k / target_fps seconds."""
    clock = np.asarray(times, dtype=np.float64) - times[0]
    duration = clock[-1] + 1 / rate
    moments = np.arange(max(1, math.ceil(duration * target_fps - _SLACK))) / target_fps
    return tuple(int(index) for index in np.searchsorted(clock, moments + _ROUNDING, side="right") - 1)


def _runs_at(times: Sequence[float], rate: float, target_fps: float) -> bool:
    """Whether the clip is regular and its rate is the target's but for a rounding."""
    drift = np.asarray(times, dtype=np.float64) - times[0] - np.arange(len(times)) / rate
    return abs(rate / target_fps - 1) < _SAME_RATE and bool(np.abs(drift).max() < 0.5 / target_fps)


def fps_text(rate: float) -> str:
    """A rate as people write it: 29.97, 30."""
    return f"{rate:.2f}".rstrip("0").rstrip(".")


def _declared(num_frames: int, source_fps: float, target_fps: float) -> Resampling:
    """`source_fps` says how fast the frames are."""
    rule = f"{source_fps:g} to {target_fps:g} fps"
    if source_fps >= target_fps:
        return Resampling(accumulated(num_frames, source_fps, target_fps), rule)
    times = [index / source_fps for index in range(num_frames)]
    note = f"source_fps = {source_fps:g} is below {target_fps:g} fps: frames are repeated, none is dropped"
    return Resampling(shown_at(times, source_fps, target_fps), rule, note)
