"""The two halves of the Wan 2.1 autoencoder: pixels to latent statistics, latents to pixels.

Four levels of width base x (1, 2, 4, 4). Height and width change between all levels, time between the last two of the
encoder and the first two of the decoder. Attribute names and the flat numbering of `downsamples` and `upsamples` are
those of the official file, so weights load by name. Source: Encoder3d and Decoder3d in wan/modules/vae.py.
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
)

LEVELS = (1, 2, 4, 4)
"""Width of each level in units of the base width."""
TIME_DOWN = (False, True, True)
"""Whether the step below each level also halves time."""


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
        for part in (self.conv1, self.downsamples, self.middle, self.head):
            x = part(x, cache)
        return x


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
        for part in (self.conv1, self.middle, self.upsamples, self.head):
            x = part(x, cache)
        return x


def _middle(width: int) -> Chain:
    return Chain(ResidualBlock(width, width), FrameAttention(width), ResidualBlock(width, width))
