"""The two halves of the Wan 2.1 autoencoder: pixels to latent statistics, latents to pixels.

Four levels of width base x (1, 2, 4, 4). Height and width change between all levels, time between the last two of the
encoder and the first two of the decoder. Attribute names and the flat numbering of `downsamples` and `upsamples` are
those of the official file, so weights load by name. Source: Encoder3d and Decoder3d in wan/modules/vae.py.

Each half comes apart where it is narrowest in space: its wide part can be computed tile by tile (see `vae_tiles`), the
other sees whole frames.
"""

from itertools import pairwise

from torch import Tensor, nn

from wanlora.models.wan.vae_layers import (
    CausalConv3d,
    CausalLayer,
    Chain,
    ChunkCache,
    Downsample,
    FrameAttention,
    Head,
    ResidualBlock,
    Upsample,
    in_turn,
)
from wanlora.models.wan.vae_tiles import NO_MARGINS, Margins, crop

LEVELS = (1, 2, 4, 4)
"""Width of each level in units of the base width."""
TIME_DOWN = (False, True, True)
"""Whether the step below each level also halves time."""
_SHRINKING = 3 * len(TIME_DOWN)
"""The encoder's layers down to an eighth of the size: three a level."""
_NARROW = 3
"""The decoder's layers before the size grows."""
DECODER_MARGINS = (7, 6, 4)
"""Positions around a tile that count, before each upsampling: half of what lies behind it sees, which are the next
level's convolutions, two a block, the upsampling's own, and at last the head's."""


class Encoder(CausalLayer):
    """A chunk of pixels [B, 3, frames, height, width] to statistics [B, 2 z, F, H, W]."""

    def __init__(self, base: int, z: int) -> None:
        super().__init__()
        widths = [base * level for level in (1, *LEVELS)]
        self.conv1 = CausalConv3d(3, base, (3, 3, 3))
        layers: list[nn.Module] = []
        for level, (narrow, wide) in enumerate(pairwise(widths)):
            layers += [ResidualBlock(narrow, wide), ResidualBlock(wide, wide)]
            if level < len(TIME_DOWN):
                layers.append(Downsample(wide, time=TIME_DOWN[level]))
        self.downsamples = Chain(*layers)
        self.middle = _middle(widths[-1])
        self.head = Head(widths[-1], 2 * z)

    def forward(self, x: Tensor, cache: ChunkCache) -> Tensor:
        return self.conclude(self.shrink(x, cache), cache)

    def shrink(self, x: Tensor, cache: ChunkCache) -> Tensor:
        """The wide part: pixels of a frame or tile to an eighth of its height and width, 4 x base channels."""
        return in_turn([self.conv1, *list(self.downsamples)[:_SHRINKING]], x, cache)

    def conclude(self, x: Tensor, cache: ChunkCache) -> Tensor:
        """The narrow part: what `shrink` made of whole frames to statistics."""
        return in_turn([*list(self.downsamples)[_SHRINKING:], self.middle, self.head], x, cache)


class Decoder(CausalLayer):
    """A chunk of latents [B, z, F, H, W] to pixels [B, 3, frames, height, width]."""

    def __init__(self, base: int, z: int) -> None:
        super().__init__()
        widths = [base * level for level in reversed(LEVELS)]
        self.conv1 = CausalConv3d(z, widths[0], (3, 3, 3))
        self.middle = _middle(widths[0])
        layers: list[nn.Module] = []
        previous = widths[0]
        for level, width in enumerate(widths):
            layers += [ResidualBlock(previous, width), ResidualBlock(width, width), ResidualBlock(width, width)]
            if level < len(TIME_DOWN):
                layers.append(Upsample(width, time=TIME_DOWN[-1 - level]))
                previous = width // 2
        self.upsamples = Chain(*layers)
        self.head = Head(base, 3)

    def forward(self, x: Tensor, cache: ChunkCache) -> Tensor:
        return self.grow(self.begin(x, cache), cache)

    def begin(self, x: Tensor, cache: ChunkCache) -> Tensor:
        """The narrow part: latents of whole frames to 4 x base channels, as large."""
        return in_turn([self.conv1, self.middle, *list(self.upsamples)[:_NARROW]], x, cache)

    def grow(self, x: Tensor, cache: ChunkCache, margins: Margins | None = None) -> Tensor:
        """The wide part: what `begin` made, of whole frames or of a tile with `margins` around it, to pixels."""
        keeps = iter(DECODER_MARGINS)
        for layer in [*list(self.upsamples)[_NARROW:], self.head]:
            if margins is not None and isinstance(layer, Upsample):
                keep = margins.at_most(next(keeps))
                x, margins = crop(x, margins, keep), keep.doubled()
            x = layer(x, cache)
        return x if margins is None else crop(x, margins, NO_MARGINS)


def _middle(width: int) -> Chain:
    return Chain(ResidualBlock(width, width), FrameAttention(width), ResidualBlock(width, width))
