"""What passes of the autoencoder are foretold to hold, against what they are counted to hold."""

from functools import partial

import pytest
import torch

from tests.held import Held
from wanlora.foundation.shapes import LatentShape, PixelShape
from wanlora.memory.tiling import Way, decoding_ways, encoding_ways, tile_size
from wanlora.models.wan.vae import VAESizes, WanVAE
from wanlora.models.wan.vae_tiles import WHOLE, Tiling

CLIP = PixelShape(640, 384, 17)


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    with torch.device("meta"):
        return WanVAE().bfloat16()


def way_with(ways: list[Way], tiling: Tiling) -> Way:
    return next(way for way in ways if way.tiling == tiling)


@pytest.mark.parametrize("tiling", [Tiling(2, 1), Tiling(2, 3)], ids=str)
def test_tiles_hold_about_what_is_foretold(vae: WanVAE, tiling: Tiling) -> None:
    latent = LatentShape.of(CLIP)
    pixels = torch.empty(1, 3, CLIP.frames, CLIP.height, CLIP.width, dtype=torch.uint8, device="meta")
    latents = torch.empty(1, 16, latent.frames, latent.height, latent.width, device="meta")
    passes = {
        way_with(list(encoding_ways(vae, CLIP, 1)), tiling).needs: partial(vae.encode, pixels),
        way_with(list(decoding_ways(CLIP, sizes=vae.sizes, itemsize=2)), tiling).needs: partial(vae.decode, latents),
    }
    for foretold, compute in passes.items():
        with Held() as held:
            compute(tiling=tiling)
        assert foretold == pytest.approx(held.most, rel=0.12)


@pytest.mark.parametrize("chunk", [1, 2])
def test_whole_frames_hold_about_what_is_foretold(vae: WanVAE, chunk: int) -> None:
    pixels = torch.empty(1, 3, CLIP.frames, CLIP.height, CLIP.width, dtype=torch.uint8, device="meta")
    usual, slower, *_ = encoding_ways(vae, CLIP, 1)
    assert (usual.chunk, slower.chunk) == (None, 1) and vae.usual_chunk(CLIP.width * CLIP.height) == 2
    with Held() as held:
        vae.encode(pixels, chunk=chunk)
    assert (slower if chunk == 1 else usual).needs == pytest.approx(held.most, rel=0.05)


def test_the_fastest_way_comes_first(vae: WanVAE) -> None:
    ways = list(encoding_ways(vae, CLIP, 4))
    whole = [way for way in ways if way.tiling == WHOLE]
    assert ways[: len(whole)] == whole
    assert [(way.by_clip, way.chunk) for way in whole] == [(False, None), (True, None), (True, 1)]
    assert sorted(way.needs for way in whole)[::-1] == [way.needs for way in whole]
    assert ways[len(whole)].tiling == Tiling(1, 2)  # a cut through the longer side spoils the fewest pixels
    assert min(way.needs for way in ways) < whole[-1].needs / 6


def test_a_picture_takes_less_than_a_clip(vae: WanVAE) -> None:
    picture, clip = (next(encoding_ways(vae, PixelShape(640, 384, frames), 1)) for frames in (1, 17))
    assert picture.needs * 4 < clip.needs


def test_frames_of_a_few_cells_are_not_cut(vae: WanVAE) -> None:
    assert [way.tiling for way in encoding_ways(vae, PixelShape(120, 64), 1)] == [WHOLE]
    assert [way.tiling for way in decoding_ways(PixelShape(120, 128), sizes=VAESizes(), itemsize=4)] == [
        WHOLE,
        Tiling(2, 1),
    ]


def test_the_largest_tile_is_named() -> None:
    assert tile_size(PixelShape(832, 480, 81), Tiling(7, 2)) == PixelShape(416, 72, 81)
