"""Which size a picture or clip is trained at: pure functions of its own size.

A bucket is a size of about the area of `resolution`. Bucketing picks the one whose aspect ratio is nearest, linearly
in width / height, the narrower on a tie: the rules by which existing caches were made.
"""

import math
from dataclasses import dataclass
from functools import cached_property

from wanlora.foundation.errors import DataError
from wanlora.foundation.shapes import SIZE_STEP, WAN21_STRIDE, floor_to_size_step

Size = tuple[int, int]
"""Width and height in pixels."""


def bucket_sizes(resolution: Size) -> tuple[Size, ...]:
    """Every bucket for an area of width x height, ascending."""
    area = resolution[0] * resolution[1]
    side = math.isqrt(area)
    sizes: set[Size] = set()
    for width in range(max(floor_to_size_step(side // 2), SIZE_STEP), side + SIZE_STEP, SIZE_STEP):
        height = floor_to_size_step(area // width)
        if height:
            sizes |= {(width, height), (height, width)}
    return tuple(sorted(sizes))


@dataclass(frozen=True, kw_only=True)
class BucketSelector:
    """Chooses a bucket for each picture or clip of one sub-dataset."""

    resolution: Size
    enabled: bool = False
    """Off: everything is cropped to exactly `resolution`."""
    no_upscale: bool = False
    """Keep what is smaller than `resolution` at its own size, floored to multiples of 16."""

    def __post_init__(self) -> None:
        if min(self.resolution) < SIZE_STEP:
            raise DataError(f"resolution {_text(self.resolution)} is below {SIZE_STEP}x{SIZE_STEP}; ask for more")
        if not self.enabled and any(side // WAN21_STRIDE.space % 2 for side in self.resolution):
            legal = tuple(floor_to_size_step(side) for side in self.resolution)
            raise DataError(
                f"resolution {_text(self.resolution)} does not divide into the model's {SIZE_STEP} pixel patches; "
                f"ask for {_text((legal[0], legal[1]))} or set enable_bucket = true"
            )

    @cached_property
    def sizes(self) -> tuple[Size, ...]:
        """The buckets to choose from, ascending."""
        return bucket_sizes(self.resolution) if self.enabled else (self.resolution,)

    def select(self, size: Size) -> Size:
        """The bucket for something of `size`. Raises `DataError` if it is too small to be kept at its own size."""
        if not self.enabled:
            return self.resolution
        width, height = size
        if self.no_upscale and width * height <= self.resolution[0] * self.resolution[1]:
            if min(size) < SIZE_STEP:
                raise DataError(
                    f"{_text(size)} is below {SIZE_STEP}x{SIZE_STEP} and bucket_no_upscale keeps it at its own size; "
                    "remove it or set bucket_no_upscale = false"
                )
            return floor_to_size_step(width), floor_to_size_step(height)
        return min(self.sizes, key=lambda bucket: abs(bucket[0] / bucket[1] - width / height))


def _text(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
