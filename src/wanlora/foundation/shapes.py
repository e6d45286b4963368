"""Sizes of pictures, clips and latents; all size arithmetic of the project is here.

Legend of the shape suffixes used in names throughout: B batch, C latent channels, F H W latent frames, height, width,
L video tokens, T text tokens, D model width, N heads, K head width. Pixel counts are given as width, height, frames.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stride:
    """How many pixels one latent cell covers."""

    time: int = 4
    space: int = 8


WAN21_STRIDE = Stride(time=4, space=8)
PATCH = 2
"""Latent cells per token along height and width."""
SIZE_STEP = WAN21_STRIDE.space * PATCH
"""Widths and heights are multiples of this many pixels."""


def floor_to_latent_frames(frames: int, stride: Stride = WAN21_STRIDE) -> int:
    """The largest 4k + 1 that is at most `frames` (at least 1)."""
    if frames < 1:
        raise ValueError(f"a clip has at least one frame, got {frames}")
    return (frames - 1) // stride.time * stride.time + 1


def floor_to_size_step(pixels: int, step: int = SIZE_STEP) -> int:
    """The largest multiple of `step` that is at most `pixels`."""
    return pixels // step * step


@dataclass(frozen=True, slots=True, order=True)
class PixelShape:
    """A picture (one frame) or a clip."""

    width: int
    height: int
    frames: int = 1

    def __str__(self) -> str:
        return f"{self.width}x{self.height}x{self.frames}"


@dataclass(frozen=True, slots=True, order=True)
class LatentShape:
    """What the VAE makes of a `PixelShape`."""

    frames: int
    height: int
    width: int

    @classmethod
    def of(cls, pixels: PixelShape, stride: Stride = WAN21_STRIDE) -> "LatentShape":
        """The latent size of a clip of 4k + 1 frames."""
        return cls(
            frames=(pixels.frames - 1) // stride.time + 1,
            height=pixels.height // stride.space,
            width=pixels.width // stride.space,
        )

    def pixels(self, stride: Stride = WAN21_STRIDE) -> PixelShape:
        """The clip that this decodes to."""
        return PixelShape(self.width * stride.space, self.height * stride.space, (self.frames - 1) * stride.time + 1)

    @property
    def num_tokens(self) -> int:
        """Transformer tokens: one per 1 x 2 x 2 latent cells."""
        return self.frames * (self.height // PATCH) * (self.width // PATCH)
