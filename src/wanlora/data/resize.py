"""Scaling a picture to cover its bucket and cropping the middle."""

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

Picture = NDArray[np.uint8]
"""One picture, height x width x RGB."""
Clip = NDArray[np.uint8]
"""Frames x height x width x RGB."""


def resize_to_cover(picture: Picture, width: int, height: int) -> Picture:
    """The picture at exactly width x height: scaled to cover it, then cropped around the centre.

    Enlarging uses Pillow's Lanczos filter, shrinking OpenCV's area average, sizes round half up, crops round down:
    pixel for pixel what existing caches were made with.
    """
    old_height, old_width = picture.shape[:2]
    if (old_width, old_height) == (width, height):
        return picture
    scale = max(width / old_width, height / old_height)
    new_size = int(old_width * scale + 0.5), int(old_height * scale + 0.5)
    if scale > 1:
        scaled = np.asarray(Image.fromarray(picture).resize(new_size, Image.Resampling.LANCZOS))
    else:
        scaled = cv2.resize(picture, new_size, interpolation=cv2.INTER_AREA)
    left, top = (new_size[0] - width) // 2, (new_size[1] - height) // 2
    return np.ascontiguousarray(scaled[top : top + height, left : left + width])
