"""Frames in tiles: the numbers of whole frames, at a part of their memory."""

import copy
import math

import pytest
import torch
from torch import Tensor

from tests.held import Held
from wanlora.models.wan import vae_coders, vae_layers
from wanlora.models.wan.vae import VAESizes, WanVAE
from wanlora.models.wan.vae_coders import DECODER_MARGINS
from wanlora.models.wan.vae_layers import ChunkCache, Downsample, Upsample
from wanlora.models.wan.vae_tiles import ENCODER_MARGINS, Tiling, spans

CASES = (
    (2, 5, 48, 40, Tiling(2, 2)),
    (1, 9, 104, 16, Tiling(3, 1)),
    (1, 1, 24, 200, Tiling(1, 7)),
    (1, 5, 56, 88, Tiling(3, 4)),
    (1, 5, 40, 24, Tiling(5, 3)),
)
"""Clips, frames, height, width: multiples of the tiles and not, tiles inside and on every edge, tiles of one cell."""


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    generator = torch.Generator().manual_seed(0)
    vae = WanVAE(VAESizes(base=8, z=4)).eval()
    for name, parameter in vae.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(1 + 0.2 * noise if name.endswith("gamma") else noise * (parameter[0].numel() ** -0.5))
    return vae


def random_clip(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)


@pytest.mark.parametrize(("clips", "frames", "height", "width", "tiling"), CASES)
def test_latents_of_tiles_are_those_of_the_frame(
    vae: WanVAE, clips: int, frames: int, height: int, width: int, tiling: Tiling
) -> None:
    pixels = random_clip(clips, 3, frames, height, width)
    torch.testing.assert_close(vae.encode(pixels, tiling=tiling), vae.encode(pixels), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("clips", "frames", "height", "width", "tiling"), CASES)
def test_pixels_of_tiles_are_those_of_the_frame(
    vae: WanVAE, clips: int, frames: int, height: int, width: int, tiling: Tiling
) -> None:
    latents = random_clip(clips, 4, frames // 4 + 1, height // 8, width // 8)
    whole = vae.decode_unclamped(latents)
    torch.testing.assert_close(vae.decode_unclamped(latents, tiling=tiling), whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(vae.decode(latents, tiling=tiling), whole.clamp(-1, 1), atol=1e-5, rtol=1e-5)


def off(vae: WanVAE, *, encoder: tuple[int, int], decoder: tuple[int, ...]) -> tuple[float, float]:
    """The largest errors of the wide parts in float64, in two tiles with these margins."""
    wide = copy.deepcopy(vae).double()
    x, z = random_clip(1, 3, 1, 176, 8).double(), random_clip(1, 32, 1, 22, 1).double()
    shrunk, grown = wide.encoder.shrink(x, ChunkCache()), wide.decoder.grow(z, ChunkCache())
    errors = []
    for margins, whole in ((encoder, shrunk), ((decoder[0], decoder[0]), grown)):
        scale = whole.shape[-2] // 22
        for tile in Tiling(2, 1).tiles(22, 1, margins):
            if whole is shrunk:
                found = tile.cut(wide.encoder.shrink(tile.outer.of(x, 8), ChunkCache()))
            else:
                found = wide.decoder.grow(tile.outer.of(z), ChunkCache(), tile.margins)
            errors.append((found - tile.inner.of(whole, scale)).abs().max().item())
    return max(errors[:2]), max(errors[2:])


def test_with_less_around_them_tiles_come_out_wrong(vae: WanVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    assert max(off(vae, encoder=ENCODER_MARGINS, decoder=DECODER_MARGINS)) < 1e-13
    for margins in ((3, 5), (4, 4)):
        assert off(vae, encoder=margins, decoder=DECODER_MARGINS)[0] > 1e-12
    fewer = (7, 6, 3)
    monkeypatch.setattr(vae_coders, "DECODER_MARGINS", fewer)
    assert off(vae, encoder=ENCODER_MARGINS, decoder=fewer)[1] > 1e-12


def test_margins_are_what_the_convolutions_see(vae: WanVAE) -> None:
    before, after = 0, 0
    for layer in reversed(list(vae.encoder.downsamples)[:9]):
        if isinstance(layer, Downsample):  # an output row is made of rows 2 i, 2 i + 1 and 2 i + 2
            before, after = 2 * before, 2 * after + 1
        else:
            before, after = before + 2, after + 2
    assert (math.ceil((before + 1) / 8), math.ceil((after + 1) / 8)) == ENCODER_MARGINS
    margins, reach = [], 1  # the head's
    for layer in reversed(list(vae.decoder.upsamples)[3:]):
        if isinstance(layer, Upsample):
            reach = math.ceil((reach + 1) / 2)
            margins.append(reach)
        else:
            reach += 2
    assert tuple(margins[::-1]) == DECODER_MARGINS


def test_bytes_larger_chunks_and_a_cache_in_main_memory_go_with_tiles(
    vae: WanVAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randint(0, 256, (1, 13, 48, 56, 3), generator=generator, dtype=torch.uint8).permute(0, 4, 1, 2, 3)
    whole = vae.encode(pixels)
    monkeypatch.setattr(vae, "cache_on_cpu", True)
    torch.testing.assert_close(vae.encode(pixels, chunk=3, tiling=Tiling(2, 2)), whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(vae.decode(whole, chunk=3, tiling=Tiling(2, 2)), vae.decode(whole), atol=1e-5, rtol=1e-5)


def test_attention_in_parts_is_attention(vae: WanVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    latents = random_clip(1, 4, 2, 9, 11)
    whole = vae.decode_unclamped(latents)
    monkeypatch.setattr(vae_layers, "_SCORES", 99 * 10)  # ten queries at once
    torch.testing.assert_close(vae.decode_unclamped(latents, tiling=Tiling(1, 2)), whole, atol=1e-5, rtol=1e-5)


def test_tiles_cover_the_frame_once() -> None:
    parts = spans(60, 7, (4, 5))
    assert [cell for inner, _ in parts for cell in range(60)[inner]] == list(range(60))
    assert all(outer.start == max(0, inner.start - 4) for inner, outer in parts)
    assert all(outer.stop == min(60, inner.stop + 5) for inner, outer in parts)


@pytest.mark.parametrize(("dtype", "encoded", "decoded"), [(torch.float32, 0.34, 0.3), (torch.bfloat16, 0.25, 0.3)])
def test_four_tiles_hold_about_a_third_of_the_frame(
    dtype: torch.dtype, encoded: float, decoded: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vae_layers, "activate_rows", lambda x, gamma, out: True)  # as where the kernel serves
    with torch.device("meta"):
        vae = WanVAE().to(dtype)
        pixels = torch.empty(1, 13, 480, 832, 3, dtype=torch.uint8).permute(0, 4, 1, 2, 3)
        latents = torch.empty(1, 16, 4, 60, 104)
    most = []
    for tiling in (Tiling(), Tiling(2, 2)):
        with Held() as held:
            vae.encode(pixels, tiling=tiling)
        most.append(held.most)
        with Held() as held:
            vae.decode(latents, tiling=tiling)
        most.append(held.most)
    assert most[2] < encoded * most[0]
    assert most[3] < decoded * most[1]
