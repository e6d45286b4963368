"""Frames in tiles, for cards that a whole frame would fill.

The wide levels of the autoencoder, those beside the pixels, are nothing but convolutions and norms of single positions.
So a tile of the frame comes out right if it is computed with enough of what lies around it: each convolution spoils one
more row at the cut edges, and the spoilt rows are thrown away. Nothing is blended, there are no seams, and up to the
order of summation the result is that of the whole frame. The narrow levels, with the attention over all positions, see
the whole frame: at an eighth of its height and width they take little.

Tiles are the outer loop and time the inner one, so what lies between chunks is as small as the tile, too. The price is
that margins are computed twice. The usual tiling cuts the whole autoencoder and blends overlaps, which gives other
latents; or it exchanges margins layer by layer, which needs the past of the whole frame at full width.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

ENCODER_MARGINS = (4, 5)
"""Latent cells before and after a tile that encoding needs: 29 and 36 pixels, and strides of 2 begin on even ones."""


class Margins(NamedTuple):
    """Rows and columns of a tensor around what it is computed for; none where the frame ends."""

    top: int
    bottom: int
    left: int
    right: int

    def doubled(self) -> "Margins":
        """The same margins after upsampling."""
        return Margins(*(2 * number for number in self))

    def at_most(self, number: int) -> "Margins":
        """What is left of them when all that lies farther off than `number` is dropped."""
        return Margins(*(min(margin, number) for margin in self))


NO_MARGINS = Margins(0, 0, 0, 0)


class Window(NamedTuple):
    """Rows and columns of a frame."""

    rows: slice
    columns: slice

    def of(self, frames: Tensor, scale: int = 1) -> Tensor:
        """This part of frames [..., height, width] whose sides are `scale` times those that the window counts in."""
        return frames[..., _scaled(self.rows, scale), _scaled(self.columns, scale)]


@dataclass(frozen=True, slots=True)
class Tile:
    """A part of a frame, counted in latent cells."""

    inner: Window
    """What is wanted."""
    outer: Window
    """What it is computed from."""

    @property
    def margins(self) -> Margins:
        """What lies around the inner part, up to the outer one's ends."""
        (rows, columns), (all_rows, all_columns) = self.inner, self.outer
        return Margins(
            rows.start - all_rows.start,
            all_rows.stop - rows.stop,
            columns.start - all_columns.start,
            all_columns.stop - columns.stop,
        )

    def cut(self, x: Tensor) -> Tensor:
        """The inner part of what was computed for the outer one."""
        return crop(x, self.margins, NO_MARGINS)


@dataclass(frozen=True, slots=True, order=True)
class Tiling:
    """Into how many tiles a frame is cut."""

    rows: int = 1
    columns: int = 1

    def __str__(self) -> str:
        return f"{self.rows * self.columns} tiles ({self.columns}x{self.rows})"

    @property
    def is_whole(self) -> bool:
        """Whether the frame stays in one piece."""
        return self.rows * self.columns == 1

    def tiles(self, height: int, width: int, margins: tuple[int, int]) -> Iterator[Tile]:
        """The tiles of a frame of `height` x `width` latent cells, with as many before and after each as `margins`."""
        for rows, all_rows in spans(height, self.rows, margins):
            for columns, all_columns in spans(width, self.columns, margins):
                yield Tile(inner=Window(rows, columns), outer=Window(all_rows, all_columns))


WHOLE = Tiling()


def crop(x: Tensor, margins: Margins, keep: Margins) -> Tensor:
    """Frames [..., height, width] with margins, less what is more than `keep`."""
    height, width = x.shape[-2:]
    rows = slice(margins.top - keep.top, height - margins.bottom + keep.bottom)
    columns = slice(margins.left - keep.left, width - margins.right + keep.right)
    return x[..., rows, columns]


def spans(size: int, number: int, margins: tuple[int, int]) -> list[tuple[slice, slice]]:
    """`size` in `number` parts of nearly one length, each without and with its margins, as far as there are any."""
    ends = [size * index // number for index in range(number + 1)]
    before, after = margins
    return [
        (slice(start, stop), slice(max(0, start - before), min(size, stop + after))) for start, stop in pairwise(ends)
    ]


def _scaled(part: slice, scale: int) -> slice:
    return slice(part.start * scale, part.stop * scale)
