"""Moving shapes as real picture and video files.

A scene is a function of time in seconds, so the same motion can be filmed at 16 and at 30 frames a second, and what a
reader must find at a given moment is known. Nothing random: the same call writes the same pictures everywhere.
"""

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from wanlora.foundation.files import atomic_path

Picture = NDArray[np.uint8]
"""Height, width, red green blue."""

_COLOURS = {"red": (214, 48, 49), "yellow": (253, 203, 110), "green": (0, 184, 148), "white": (245, 246, 250)}
_GROUNDS = {"blue": (9, 60, 140), "grey": (99, 110, 114), "violet": (72, 52, 120), "dark": (30, 39, 46)}
_MOTIONS = {"to the right": (0.12, 0.0), "to the left": (-0.12, 0.0), "upwards": (0.0, -0.1), "downwards": (0.0, 0.1)}


@dataclass(frozen=True, slots=True)
class Scene:
    """One shape that crosses a shaded ground."""

    name: str
    shape: str
    colour: str
    ground: str
    motion: str

    @property
    def caption(self) -> str:
        """The sentence that goes beside the file."""
        return f"Tiny style. A {self.colour} {self.shape} moves {self.motion} over a {self.ground} ground."

    def picture(self, seconds: float, width: int, height: int) -> Picture:
        """The scene at a moment, as [height, width, 3]."""
        y, x = np.mgrid[0:height, 0:width]
        x, y = x / width, y / height
        speed_x, speed_y = _MOTIONS[self.motion]
        centre_x, centre_y = (0.5 + speed_x * seconds) % 1.0, (0.5 + speed_y * seconds) % 1.0
        dx, dy = np.abs(x - centre_x) * width / height, np.abs(y - centre_y)
        inside = np.maximum(dx, dy) < 0.2 if self.shape == "square" else np.hypot(dx, dy) < 0.25
        if self.shape == "ring":
            inside &= np.hypot(dx, dy) > 0.12
        shade = (0.6 + 0.4 * (x + y) / 2)[..., None]
        pixels = np.where(inside[..., None], np.array(_COLOURS[self.colour]), shade * np.array(_GROUNDS[self.ground]))
        return pixels.astype(np.uint8)


SCENES = (
    Scene("scene_01", "circle", "red", "blue", "to the right"),
    Scene("scene_02", "square", "yellow", "grey", "to the left"),
    Scene("scene_03", "ring", "green", "violet", "upwards"),
    Scene("scene_04", "circle", "white", "dark", "downwards"),
    Scene("scene_05", "square", "red", "violet", "to the right"),
    Scene("scene_06", "ring", "yellow", "dark", "to the left"),
)


def write_clip(path: Path, scene: Scene, *, frames: int, fps: int = 16, width: int = 192, height: int = 128) -> None:
    """Film a scene as h264 in the container that the suffix names (`.mp4`)."""
    with atomic_path(path) as temporary, av.open(str(temporary), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps), options={"crf": "18"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(frames):
            picture = av.VideoFrame.from_ndarray(scene.picture(index / fps, width, height), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def write_picture(path: Path, scene: Scene, *, width: int = 160, height: int = 160) -> None:
    """Photograph a scene in the format that the suffix names (`.png`, `.jpg`)."""
    with atomic_path(path) as temporary:
        Image.fromarray(scene.picture(0.0, width, height)).save(temporary)
