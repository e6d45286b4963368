"""The comparison as one picture: a row for each prompt, a column for each model, several frames of each clip.

Each clip's strip ends with its trail, so that the motion is seen in a picture that stands still.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from wanlora.foundation.files import atomic_path
from wanlora.generation.pipeline import Frames
from wanlora.quickstart.comparison import Comparison

NUM_FRAMES, NUM_TRACES = 4, 7
_GAP, _MARGIN, _BETWEEN, _TEXT = 3, 28, 22, 15
_CONTRAST = 60
"""How far from the ground's colour something is that leaves a trace, of 441."""
_GROUND, _BLACK, _GREY = (255, 255, 255), (24, 24, 28), (110, 112, 118)


def columns(comparison: Comparison) -> dict[str, Sequence[Frames]]:
    """Clips by the title of their column."""
    return {
        "base model": comparison.base,
        **{f"LoRA, {name}": clips for name, clips in comparison.lora.items()},
        "LoRA off again": comparison.off,
        "dataset": comparison.dataset,
    }


def write_sheet(path: Path, comparison: Comparison, words: Sequence[str]) -> None:
    """Write the contact sheet as png; `words` stand below."""
    strips = {title: [_strip(clip) for clip in clips] for title, clips in columns(comparison).items()}
    captions = [request.prompt for request in comparison.requests]
    with atomic_path(path) as temporary:
        _sheet(strips, captions, words).save(temporary, format="png", optimize=True)


def trail(frames: Frames) -> NDArray[np.uint8]:
    """A clip [F, H, W, 3] as one picture [H, W, 3]: what stands out from the ground, the earlier the paler."""
    ground = np.median(frames.reshape(-1, 3), axis=0)
    picture = np.broadcast_to(ground, frames.shape[1:])
    for number, frame in enumerate(frames[_spread(len(frames), NUM_TRACES)], 1):
        stands_out = np.linalg.norm(frame - ground, axis=-1, keepdims=True) > _CONTRAST
        picture = np.where(stands_out, ground + (frame - ground) * number / NUM_TRACES, picture)
    return picture.round().astype(np.uint8)


def _spread(length: int, count: int) -> NDArray[np.intp]:
    return np.unique(np.linspace(0, length - 1, count).round().astype(np.intp))


def _strip(frames: Frames) -> Image.Image:
    """A few frames of a clip, evenly spread, and its trail, side by side."""
    tiles = [*frames[_spread(len(frames), NUM_FRAMES)], *([trail(frames)] if len(frames) > 1 else [])]
    height, width = frames.shape[1:3]
    strip = Image.new("RGB", (len(tiles) * (width + _GAP) - _GAP, height), _GROUND)
    for place, tile in enumerate(tiles):
        strip.paste(Image.fromarray(tile), (place * (width + _GAP), 0))
    return strip


def _sheet(strips: Mapping[str, Sequence[Image.Image]], captions: Sequence[str], words: Sequence[str]) -> Image.Image:
    widths = {title: max(strip.width for strip in column) for title, column in strips.items()}
    heights = [max(column[row].height for column in strips.values()) for row in range(len(captions))]
    line = 2 * _TEXT
    width = 2 * _MARGIN + sum(widths.values()) + _BETWEEN * (len(widths) - 1)
    height = 2 * _MARGIN + line + sum(heights) + line * len(heights) + line * len(words)
    sheet = Image.new("RGB", (width, height), _GROUND)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(_TEXT)
    left = _MARGIN
    for title, column in strips.items():
        pen.text((left, _MARGIN), title, _BLACK, font=font)
        top = _MARGIN + line
        for strip, row_height in zip(column, heights, strict=True):
            sheet.paste(strip, (left, top + _TEXT + 8))
            top += row_height + line
        left += widths[title] + _BETWEEN
    top = _MARGIN + line
    for caption, row_height in zip(captions, heights, strict=True):
        pen.text((_MARGIN, top), caption, _GREY, font=font)
        top += row_height + line
    for number, sentence in enumerate(words):
        pen.text((_MARGIN, top + 12 + number * (_TEXT + 8)), sentence, _BLACK, font=font)
    return sheet
