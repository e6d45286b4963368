"""What the autoencoder's passes hold at most, with whole frames and with tiles of them.

Counted on the meta device with the plain operations, in numbers a pixel: what is in use at the widest level and what is
remembered of the chunk before. Workspaces of libraries come on top, and attention where no fused kernel serves: whoever
relies on this has to be ready for less memory than is foretold.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from wanlora.foundation.shapes import WAN21_STRIDE, LatentShape, PixelShape
from wanlora.models.wan.vae import VAESizes, WanVAE
from wanlora.models.wan.vae_coders import LEVELS
from wanlora.models.wan.vae_tiles import ENCODER_MARGINS, WHOLE, Tiling, spans

_ENCODED, _ENCODED_BY_TWO, _ENCODED_PICTURE = 2960, 4510, 480
"""Of a clip, one latent frame at a time and two, and of a picture."""
_DECODED, _DECODED_PICTURE = 3950, 560
_DECODER_MARGINS = (1, 1)
"""Latent cells around a tile on the decoder's widest level."""
_NARROWEST = 8
"""Latent cells along a side of the smallest tile: of what is encoded for it, four fifths are margins."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """How a pass can be computed."""

    needs: int
    """Bytes that it holds at most, beside the weights."""
    by_clip: bool = False
    """The clips of a batch go one by one."""
    chunk: int | None = None
    """Latent frames at a time after the first; as the autoencoder likes it if it is None."""
    tiling: Tiling = WHOLE


@dataclass(frozen=True, slots=True)
class _Cut:
    """A frame in tiles."""

    tiling: Tiling
    share: float
    """What the largest tile with its margins is of the frame."""
    work: float
    """What all of them are of the frame."""


def encoding_ways(vae: WanVAE, pixels: PixelShape, clips: int) -> Iterator[Way]:
    """Ways to encode a batch of clips, the fastest first."""
    area = pixels.width * pixels.height
    scale = vae.dtype.itemsize * vae.sizes.base / VAESizes().base
    whole = scale * area * (_ENCODED if pixels.frames > 1 else _ENCODED_PICTURE)

    def usual(clips: int) -> int:
        by_two = pixels.frames > 1 and vae.usual_chunk(clips * area) > 1
        return round(clips * (scale * area * _ENCODED_BY_TWO if by_two else whole))

    yield Way(needs=usual(clips))
    if clips > 1:
        yield Way(needs=usual(1), by_clip=True)
    if usual(1) > whole:
        yield Way(needs=round(whole), by_clip=True, chunk=1)
    narrow = vae.dtype.itemsize * _narrow(pixels, vae.sizes)
    for cut in _cuts(LatentShape.of(pixels), ENCODER_MARGINS, _NARROWEST):
        yield Way(needs=round(whole * cut.share) + narrow, by_clip=True, chunk=1, tiling=cut.tiling)


def decoding_ways(pixels: PixelShape, *, sizes: VAESizes, itemsize: int) -> Iterator[Way]:
    """Ways to decode a clip, the fastest first."""
    area = pixels.width * pixels.height
    work = itemsize * sizes.base / VAESizes().base * area * (_DECODED if pixels.frames > 1 else _DECODED_PICTURE)
    result = itemsize * 3 * area * pixels.frames
    yield Way(needs=round(work) + result)
    narrow = itemsize * _narrow(pixels, sizes)
    for cut in _cuts(LatentShape.of(pixels), _DECODER_MARGINS, _NARROWEST):
        yield Way(needs=round(work * cut.share) + narrow + result, tiling=cut.tiling)


def _narrow(pixels: PixelShape, sizes: VAESizes) -> int:
    """Numbers that lie between the part that works in tiles and the other."""
    latent = LatentShape.of(pixels)
    return LEVELS[-1] * sizes.base * latent.frames * latent.height * latent.width


@cache
def _cuts(latent: LatentShape, margins: tuple[int, int], narrowest: int) -> tuple[_Cut, ...]:
    """Every tiling of a frame without narrower tiles, that with the least work first."""
    rows, columns = (
        [_along(size, number, margins) for number in range(1, max(1, size // narrowest) + 1)]
        for size in (latent.height, latent.width)
    )
    cuts = [
        _Cut(Tiling(row + 1, column + 1), high * wide, high_work * wide_work)
        for row, (high, high_work) in enumerate(rows)
        for column, (wide, wide_work) in enumerate(columns)
        if row or column
    ]
    return tuple(sorted(cuts, key=lambda cut: (cut.work, cut.share)))


def _along(size: int, number: int, margins: tuple[int, int]) -> tuple[float, float]:
    """What the longest of so many parts is of a side, and all of them, with their margins."""
    lengths = [outer.stop - outer.start for _, outer in spans(size, number, margins)]
    return max(lengths) / size, sum(lengths) / size


def tile_size(pixels: PixelShape, tiling: Tiling) -> PixelShape:
    """The largest tile, without margins."""
    latent, step = LatentShape.of(pixels), WAN21_STRIDE.space
    height, width = -(-latent.height // tiling.rows), -(-latent.width // tiling.columns)
    return PixelShape(width * step, height * step, pixels.frames)
