"""Tiny pictures and clips whose frames can be told apart: frame k is grey at level 4 k."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from wanlora.data.resize import Clip

WIDTH, HEIGHT = 64, 48
_LEVEL = 4


def make_clip(
    path: Path,
    frames: int,
    rate: int = 16,
    *,
    codec: str = "libx264",
    size: tuple[int, int] = (WIDTH, HEIGHT),
    milliseconds: Sequence[int] | None = None,
    rotation: int = 0,
) -> Path:
    """A video file; `milliseconds` gives each frame's time, `rotation` is stored in the container."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        if milliseconds is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        for index in range(frames):
            picture = np.full((size[1], size[0], 3), index * _LEVEL, np.uint8)
            picture[: size[1] // 4, : size[0] // 4] = 255  # a white corner shows which way is up
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if milliseconds is not None:
                frame.pts, frame.time_base = milliseconds[index], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def frame_numbers(clip: Clip) -> list[int]:
    """Which frames a decoded clip shows."""
    height, width = clip.shape[1:3]
    centre = clip[:, height // 2 : -4, width // 2 : -4].astype(float)
    return [round(float(level) / _LEVEL) for level in centre.mean(axis=(1, 2, 3))]


def make_picture(path: Path, size: tuple[int, int] = (WIDTH, HEIGHT), level: int = 100) -> Path:
    """A grey picture with a white top left corner, in the format of the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((size[1], size[0], 3), level, np.uint8)
    pixels[: size[1] // 4, : size[0] // 4] = 255
    Image.fromarray(pixels).save(path, quality=100)
    return path


def write_caption(path: Path, text: str = "a clip") -> Path:
    """The caption file beside a picture or clip."""
    caption = path.with_suffix(".txt")
    caption.write_text(text, encoding="utf-8")
    return path
