"""What the making of previews takes of a card, roughly: the text encoder before training, and then, beside the model
that is being trained, sampling without gradients and the decoder of the VAE.
"""

from math import prod

from wanlora.foundation.shapes import LatentShape, PixelShape
from wanlora.foundation.tensor_files import TensorSource
from wanlora.memory.footprint import BlockMaths
from wanlora.memory.tiling import decoding_ways
from wanlora.models.wan.umt5_keys import official_name
from wanlora.models.wan.vae import VAESizes

_MOST_TILES = 16
"""Where frames may be decoded in tiles, a plan counts on so many: more cost much time."""
_RELEASED_WEIGHTS = 126.9e6
_TEXT_WORKSPACE = 300 * 2**20


def text_encoder_bytes(source: TensorSource, *, fp8: bool) -> int:
    """Weights of the text encoder in a file, in bfloat16 or with `fp8` in eight bits where they are matrices."""
    weights = 0
    for stored in source.names:
        name = official_name(stored)
        if name is not None:
            shape = source.shape(stored)
            weights += prod(shape) * (1 if fp8 and len(shape) == 2 and "embedding" not in name else 2)
    return weights + _TEXT_WORKSPACE


def decoder_bytes(source: TensorSource, pixels: PixelShape, *, itemsize: int, tiled: bool = False) -> int:
    """The VAE's weights in a file and what it needs at most to decode a clip, in a format of `itemsize` bytes.

    `tiled` is whether frames may be decoded in tiles; then it is the least that this takes.
    """
    weights = sum(prod(source.shape(name)) for name in source.names)
    width = (weights / _RELEASED_WEIGHTS) ** 0.5  # weights grow with the square of a layer's width
    whole, *others = decoding_ways(pixels, sizes=VAESizes(base=round(width * VAESizes().base)), itemsize=itemsize)
    tilings = [way for way in others if way.tiling.rows * way.tiling.columns <= _MOST_TILES] if tiled else []
    return itemsize * weights + min(way.needs for way in [whole, *tilings])


def sampling_bytes(maths: BlockMaths, pixels: PixelShape) -> int:
    """What one block needs for a clip without gradients: the stream, its norm, queries, keys, values and one
    feed-forward activation, before and behind the GELU."""
    sizes, item = maths.sizes, maths.compute.itemsize
    per_token = sizes.dim * (2 * maths.residual.itemsize + 4 + 6 * item) + 2 * sizes.ffn_dim * item
    return LatentShape.of(pixels).num_tokens * per_token
