"""The Wan 2.1 video autoencoder, which Wan 2.2's A14B models share.

Pixels in [-1, 1] become latents with 16 channels, an eighth of the height and width and a quarter of the frames after
the first. Latents are the mean of the encoder's distribution, brought to zero mean and unit variance with published
constants per channel. Clips pass in chunks (see `vae_layers`), so memory does not grow with their length; frames pass
whole or, where memory demands it, in tiles (see `vae_tiles`), which give the same.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

from wanlora.foundation.blank import without_memory
from wanlora.foundation.errors import CheckpointError, DataError
from wanlora.foundation.shapes import WAN21_STRIDE, LatentShape, PixelShape, floor_to_latent_frames
from wanlora.foundation.tensor_files import TensorSource, open_tensors
from wanlora.models.wan.recognise import describe, file_kind
from wanlora.models.wan.vae_coders import DECODER_MARGINS, LEVELS, Decoder, Encoder
from wanlora.models.wan.vae_keys import diffusers_name
from wanlora.models.wan.vae_layers import ChunkCache
from wanlora.models.wan.vae_tiles import ENCODER_MARGINS, WHOLE, Tiling, Window
from wanlora.models.wan.weights import fill, require_names, require_shapes

# fmt: off
VAE_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)
VAE_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)
# fmt: on
_WHAT = "the Wan 2.1 VAE"
_AT_ONCE = 650_000_000
"""Bytes that a chunk takes on the encoder's widest level; three to four times as much is in use."""
_LARGEST_CHUNK = 2
"""Latent frames; eight pixel frames of any usual size fill a card."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VAESizes:
    """What differs between autoencoders of this structure; the defaults are the released one's."""

    base: int = 96
    """Channels of the widest level in space."""
    z: int = 16
    """Latent channels."""


class WanVAE(nn.Module):
    """Encodes and decodes whole clips.

    Latents of a size other than the released 16 channels have no published statistics and are left as they are.
    """

    def __init__(self, sizes: VAESizes | None = None, *, cache_on_cpu: bool = False) -> None:
        super().__init__()
        self.sizes = sizes or VAESizes()
        self.cache_on_cpu = cache_on_cpu
        """Keep what lies between chunks in main memory: slower, for cards that the cache would fill."""
        z = self.sizes.z
        self.encoder = Encoder(self.sizes.base, z)
        self.conv1 = nn.Conv3d(2 * z, 2 * z, 1)
        self.conv2 = nn.Conv3d(z, z, 1)
        self.decoder = Decoder(self.sizes.base, z)
        self.requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.conv1.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The number format of weights, maths and results."""
        return self.conv1.weight.dtype

    @torch.no_grad()
    def encode(self, pixels_BCFHW: Tensor, *, chunk: int | None = None, tiling: Tiling = WHOLE) -> Tensor:
        """Normalised mean latents [B, z, F, H, W] of clips [B, 3, frames, height, width].

        The clips are bytes, or numbers in [-1, 1] of any format. They may lie on another device: each chunk is moved
        when its turn comes. `chunk` is the number of latent frames computed at a time after the first; as many as
        `_AT_ONCE` allows if it is None, and one in tiles. Raises `DataError` unless there are 4k + 1 frames and height
        and width are multiples of 8.
        """
        latent = _latent_shape(pixels_BCFHW)
        clips, _, _, height, width = pixels_BCFHW.shape
        chunk = chunk or (self.usual_chunk(clips * height * width) if tiling.is_whole else 1)
        shrunk = None if tiling.is_whole else self._shrink(pixels_BCFHW, latent, chunk, tiling)
        latents_BCFHW = self._empty(clips, self.sizes.z, latent)
        mean, std = self._mean, self._std
        for part, cache in self._chunks(latent.frames, chunk, frugal=not tiling.is_whole):
            if shrunk is None:
                found = self.encoder(self._numbers(pixels_BCFHW[:, :, _pixel_frames(part)]), cache)
            else:
                found = self.encoder.conclude(shrunk[:, :, part], cache)
            found, _ = self.conv1(found).chunk(2, dim=1)
            latents_BCFHW[:, :, part] = (found.float() - mean) / std
        return latents_BCFHW

    def _shrink(self, pixels_BCFHW: Tensor, latent: LatentShape, chunk: int, tiling: Tiling) -> Tensor:
        """What the encoder's wide part makes of the clips, tile by tile: [B, 4 base, F, H, W]."""
        shrunk_BCFHW = self._empty(len(pixels_BCFHW), LEVELS[-1] * self.sizes.base, latent)
        for tile in tiling.tiles(latent.height, latent.width, ENCODER_MARGINS):
            for part, cache in self._chunks(latent.frames, chunk):
                x = self._numbers(pixels_BCFHW[:, :, _pixel_frames(part)], tile.outer)
                found = self.encoder.shrink(x, cache)
                tile.inner.of(shrunk_BCFHW[:, :, part]).copy_(tile.cut(found))
        return shrunk_BCFHW

    def _numbers(self, pixels_BCFHW: Tensor, window: Window | None = None) -> Tensor:
        """Pixels, or those in a window of latent cells, where and as the encoder reads them."""
        pixels_BCFHW = pixels_BCFHW.to(self.device, non_blocking=pixels_BCFHW.is_pinned())
        if window is not None:
            pixels_BCFHW = window.of(pixels_BCFHW, WAN21_STRIDE.space)
        if pixels_BCFHW.dtype == torch.uint8:
            pixels_BCFHW = pixels_BCFHW.float().div_(127.5).sub_(1)
        return pixels_BCFHW.to(self.dtype)

    def usual_chunk(self, frame: int) -> int:
        """How many latent frames are encoded at once if one frame of all clips has so many pixels."""
        latent_frame = WAN21_STRIDE.time * frame * self.sizes.base * self.dtype.itemsize
        return max(1, min(_LARGEST_CHUNK, _AT_ONCE // latent_frame))

    @torch.no_grad()
    def decode(self, latents_BCFHW: Tensor, *, chunk: int = 1, tiling: Tiling = WHOLE) -> Tensor:
        """Pixels [B, 3, frames, height, width] in [-1, 1] of normalised latents [B, z, F, H, W]."""
        return self.decode_unclamped(latents_BCFHW, chunk=chunk, tiling=tiling).clamp_(-1, 1)

    @torch.no_grad()
    def decode_unclamped(self, latents_BCFHW: Tensor, *, chunk: int = 1, tiling: Tiling = WHOLE) -> Tensor:
        """As `decode`, with what the network puts outside [-1, 1]."""
        latent = LatentShape(*latents_BCFHW.shape[2:])
        pixels = latent.pixels(WAN21_STRIDE)
        shape = (len(latents_BCFHW), 3, pixels.frames, pixels.height, pixels.width)
        pixels_BCFHW = torch.empty(shape, device=self.device, dtype=self.dtype)
        if tiling.is_whole:
            for part, cache in self._chunks(latent.frames, chunk):
                pixels_BCFHW[:, :, _pixel_frames(part)] = self.decoder(self._raw(latents_BCFHW[:, :, part]), cache)
            return pixels_BCFHW
        begun_BCFHW = self._empty(len(latents_BCFHW), LEVELS[-1] * self.sizes.base, latent)
        for part, cache in self._chunks(latent.frames, chunk, frugal=True):
            begun_BCFHW[:, :, part] = self.decoder.begin(self._raw(latents_BCFHW[:, :, part]), cache)
        for tile in tiling.tiles(latent.height, latent.width, (DECODER_MARGINS[0], DECODER_MARGINS[0])):
            for part, cache in self._chunks(latent.frames, chunk):
                found = self.decoder.grow(tile.outer.of(begun_BCFHW[:, :, part]), cache, tile.margins)
                tile.inner.of(pixels_BCFHW[:, :, _pixel_frames(part)], WAN21_STRIDE.space).copy_(found)
        return pixels_BCFHW

    def _raw(self, latents_BCFHW: Tensor) -> Tensor:
        """Latents as the decoder reads them."""
        z = latents_BCFHW.to(self.device).float() * self._std + self._mean
        raw: Tensor = self.conv2(z.to(self.dtype))
        return raw

    def _empty(self, clips: int, channels: int, latent: LatentShape) -> Tensor:
        shape = (clips, channels, latent.frames, latent.height, latent.width)
        return torch.empty(shape, device=self.device, dtype=self.dtype)

    def _chunks(self, num_latents: int, chunk: int, *, frugal: bool = False) -> Iterator[tuple[slice, ChunkCache]]:
        """The first latent alone, then `chunk` at a time, with the cache made ready for each."""
        cache = ChunkCache(on_cpu=self.cache_on_cpu, frugal=frugal)
        start = 0
        while start < num_latents:
            stop = min(start + chunk, num_latents) if start else 1
            cache.begin(first=start == 0, last=stop == num_latents)
            yield slice(start, stop), cache
            start = stop

    @property
    def _mean(self) -> Tensor:
        return self._per_channel(VAE_MEAN, otherwise=0.0)

    @property
    def _std(self) -> Tensor:
        return self._per_channel(VAE_STD, otherwise=1.0)

    def _per_channel(self, values: tuple[float, ...], *, otherwise: float) -> Tensor:
        known = values if len(values) == self.sizes.z else (otherwise,) * self.sizes.z
        return rearrange(torch.tensor(known, device=self.device), "c -> 1 c 1 1 1")


def load_vae(
    path: Path, *, device: torch.device | str, dtype: torch.dtype = torch.float32, cache_on_cpu: bool = False
) -> WanVAE:
    """The autoencoder stored at `path`, under official, ComfyUI or Diffusers names, frozen.

    Raises `CheckpointError` for other files and says what they are.
    """
    with open_tensors(path) as source:
        names = _names(source)
        sizes = VAESizes(base=source.shape(names["encoder.conv1.weight"])[0], z=source.shape(names["conv2.weight"])[0])
        with without_memory():
            vae = WanVAE(sizes, cache_on_cpu=cache_on_cpu)
        require_shapes(source, _WHAT, vae, names)
        fill(vae, source, names, device=torch.device(device), dtype=dtype)
    if torch.device(device).type == "cuda":
        _put_channels_last(vae)
    return vae.eval()


def _put_channels_last(vae: nn.Module) -> None:
    """Lay the kernels out as cards convolve fastest; activations follow them."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in vae.parameters():
        if parameter.ndim in formats:
            parameter.data = parameter.data.contiguous(memory_format=formats[parameter.ndim])


def _names(source: TensorSource) -> Mapping[str, str]:
    """The name in the file for each official name."""
    kind = file_kind(source.names)
    if kind is None or kind.name != _WHAT:
        raise CheckpointError(
            f"{source.path} {describe(source.names)}; --vae needs {_WHAT} (Wan2.1_VAE.pth or wan_2.1_vae.safetensors)"
        )
    with without_memory():
        official = list(WanVAE().state_dict())
    spellings = [{name: spell(name) for name in official} for spell in (str, diffusers_name)]
    names = max(spellings, key=lambda spelling: len(set(spelling.values()) & set(source.names)))
    require_names(source.path, _WHAT, names.values(), source.names)
    return names


def _latent_shape(pixels_BCFHW: Tensor) -> LatentShape:
    num_frames, height, width = pixels_BCFHW.shape[2:]
    if floor_to_latent_frames(num_frames) != num_frames:
        raise DataError(
            f"a clip of {num_frames} frames cannot be encoded whole: the VAE takes 4k + 1 frames; "
            f"cut it to {floor_to_latent_frames(num_frames)}"
        )
    if height % WAN21_STRIDE.space or width % WAN21_STRIDE.space:
        raise DataError(f"a clip of {width}x{height} cannot be encoded: both sides must be multiples of 8")
    return LatentShape.of(PixelShape(width, height, num_frames))


def _pixel_frames(latents: slice) -> slice:
    """The frames that these latent frames stand for."""
    step = WAN21_STRIDE.time
    return slice(max(0, latents.start * step - step + 1), latents.stop * step - step + 1)
