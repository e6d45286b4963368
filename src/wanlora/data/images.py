"""Reading still pictures as RGB, upright, or saying what is wrong with them.

Pillow does the reading because it raises where OpenCV returns nothing. Transparency is dropped, not composited: the
colour under it is kept, as existing caches were made, and the user is told once.
"""

import struct
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from wanlora.data.resize import Picture
from wanlora.foundation.errors import DataError
from wanlora.foundation.log import warn_once

_ORIENTATION = 0x0112
_SIDEWAYS = range(5, 9)
_UNREADABLE = (
    *(UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError),
    *(struct.error, IndexError, TypeError, KeyError, RuntimeError),  # decoders on senseless bytes
)


def image_size(path: Path) -> tuple[int, int]:
    """Width and height as shown, EXIF orientation applied, from the header alone. Raises `DataError`."""
    with _opened(path) as image:
        width, height = image.size
        try:
            sideways = image.getexif().get(_ORIENTATION) in _SIDEWAYS
        except _UNREADABLE as error:
            raise _broken(path, error) from error
    return (height, width) if sideways else (width, height)


def read_image(path: Path) -> Picture:
    """The picture, height x width x RGB, upright. Raises `DataError` for a missing, cut off or foreign file."""
    with _opened(path) as image:
        try:
            upright = ImageOps.exif_transpose(image)
            _mention_transparency(path, upright)
            return np.asarray(_to_rgb(upright), dtype=np.uint8)
        except _UNREADABLE as error:
            raise _broken(path, error) from error


def _opened(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist; check the spelling and the drive") from error
    except _UNREADABLE as error:
        raise _broken(path, error) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    """8 bits per colour; 16-bit grey is scaled, because Pillow's own conversion would clip it to white."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def _mention_transparency(path: Path, image: Image.Image) -> None:
    if "A" not in image.getbands() and "transparency" not in image.info:
        return
    alpha = image.convert("RGBA").getchannel("A")
    lowest = alpha.getextrema()[0]
    if isinstance(lowest, int | float) and lowest < 255:
        warn_once(
            f"some pictures are transparent in places, {path.name} first; the transparency is dropped and the colours "
            "under it are trained. Flatten them on a background if that is not what they should look like"
        )


def _broken(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} is cut off or is no picture ({error}); replace it or take it out of the dataset")
