"""The autoencoder's passes, fitted to the memory that is there.

A pass is computed in the fastest way that the card's free memory allows by what is foretold: as it comes, clip by clip,
one latent frame at a time, at last in tiles of the frame, as few as suffice. Latents and pixels are the same up to
rounding. If memory runs out in spite of that, the pass is computed again in a way that needs a quarter less, and
nothing that is foretold to need more is tried from then on. Devices other than cards compute whole frames unless tiles
are asked for.
"""

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor

from wanlora.foundation.log import log
from wanlora.foundation.shapes import LatentShape, PixelShape
from wanlora.memory.limit import free_for_tensors
from wanlora.memory.measure import GIB, is_out_of_memory
from wanlora.memory.tiling import Way, decoding_ways, encoding_ways, tile_size
from wanlora.models.wan.vae import WanVAE

TilingChoice = Literal["auto", "on", "off"]
"""Tiles where memory does not suffice for whole frames; always; never."""
Room = Callable[[torch.device], int | None]
"""Bytes that tensors may still take of a device; None if nobody knows."""
_LESS = 0.75
"""What is tried after memory has run out needs at most this part of what did not fit."""


class FittedVAE:
    """An autoencoder that computes as much at once as memory allows."""

    def __init__(self, vae: WanVAE, *, tiling: TilingChoice = "auto", room: Room = free_for_tensors) -> None:
        self.vae = vae
        self._tiling = tiling
        self._room = room
        self._ceiling: float | None = None
        """Bytes that a way may need since memory ran out."""
        self._said: set[object] = set()

    def to(self, device: torch.device | str) -> None:
        """Move the weights."""
        self.vae.to(device)

    def encode(self, pixels_BCFHW: Tensor) -> Tensor:
        """Latents as of `WanVAE.encode`. Raises torch's error if memory does not suffice in any way."""
        clips, _, frames, height, width = pixels_BCFHW.shape
        pixels, vae = PixelShape(width, height, frames), self.vae
        ways = encoding_ways(vae, pixels, clips)
        return self._fit(f"{pixels} is encoded", pixels, ways, lambda way: _encode(vae, pixels_BCFHW, way))

    def decode(self, latents_BCFHW: Tensor) -> Tensor:
        """Pixels as of `WanVAE.decode`. Raises torch's error if memory does not suffice in any way."""
        pixels, vae = LatentShape(*latents_BCFHW.shape[2:]).pixels(), self.vae
        ways = decoding_ways(pixels, sizes=vae.sizes, itemsize=vae.dtype.itemsize)
        return self._fit(f"{pixels} is decoded", pixels, ways, lambda way: vae.decode(latents_BCFHW, tiling=way.tiling))

    def _fit(self, what: str, pixels: PixelShape, ways: Iterable[Way], compute: Callable[[Way], Tensor]) -> Tensor:
        """The result of the fastest way that fits."""
        usual, *others = ways
        allowed = self._allowed(usual, others)
        while True:
            room = self._room(self.vae.device)
            way = self._choose(allowed, room)
            if way != usual or self._tiling == "on":
                self._say(what, pixels, way, usual, room)
            try:
                return compute(way)
            except Exception as error:  # CUDA's libraries have errors of their own for it
                less = _LESS * way.needs
                if not is_out_of_memory(error) or all(other.needs > less for other in allowed):
                    raise
            log.warning(f"memory ran out while {what.replace(' is ', ' was ')}; it is tried again with less at once")
            self._ceiling = less
            if self.vae.device.type == "cuda":
                torch.cuda.empty_cache()

    def _allowed(self, usual: Way, others: list[Way]) -> list[Way]:
        """The ways that the user's choice and the device leave."""
        if self._tiling == "on":
            return [way for way in others if not way.tiling.is_whole] or [usual]
        if self._tiling == "off" or self._room(self.vae.device) is None:
            return [usual]
        return [usual, *others]

    def _choose(self, ways: list[Way], room: int | None) -> Way:
        """The first that fits; the least one if none does."""
        bounds = [bound for bound in (room, self._ceiling) if bound is not None]
        return next(
            (way for way in ways if all(way.needs <= bound for bound in bounds)), min(ways, key=lambda way: way.needs)
        )

    def _say(self, what: str, pixels: PixelShape, way: Way, usual: Way, room: int | None) -> None:
        """Say once for each size how it is computed, and why."""
        if (what, way) in self._said:
            return
        self._said.add((what, way))
        if way == usual:
            log.info(f"--vae_tiling on: {pixels} is too small for tiles")
            return
        if self._tiling == "on":
            why = "--vae_tiling on"
        elif self._ceiling is not None and usual.needs > self._ceiling:
            why = "memory ran out"
        else:
            why = f"else it would take {usual.needs / GIB:.1f} GiB, {(room or 0) / GIB:.1f} are free"
        log.info(f"{what} {_words(pixels, way)} ({why}); up to rounding the result is the same")


def _words(pixels: PixelShape, way: Way) -> str:
    if not way.tiling.is_whole:
        tile = tile_size(pixels, way.tiling)
        return f"in {way.tiling} of {tile.width}x{tile.height} and what lies around them"
    return "one latent frame at a time" if way.chunk else "clip by clip"


def _encode(vae: WanVAE, pixels_BCFHW: Tensor, way: Way) -> Tensor:
    if not way.by_clip:
        return vae.encode(pixels_BCFHW)
    clips = pixels_BCFHW.split(1)
    latents = [vae.encode(clip, chunk=way.chunk, tiling=way.tiling) for clip in clips]
    return latents[0] if len(latents) == 1 else torch.cat(latents)
