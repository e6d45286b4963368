"""The Wan 2.1 autoencoder: sizes, chunks, batches, causality."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.held import Held
from wanlora.foundation.errors import DataError
from wanlora.models.wan import vae_layers
from wanlora.models.wan.vae import VAE_MEAN, VAE_STD, VAESizes, WanVAE
from wanlora.models.wan.vae_layers import CausalConv3d, ChunkCache

GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    return random_vae(z=4)


def random_vae(z: int) -> WanVAE:
    generator = torch.Generator().manual_seed(0)
    vae = WanVAE(VAESizes(base=8, z=z)).eval()
    for name, parameter in vae.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(1 + 0.2 * noise if name.endswith("gamma") else noise * (parameter[0].numel() ** -0.5))
    return vae


def random_clip(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1)


def test_names_and_shapes_are_those_of_the_released_file() -> None:
    expected = json.loads((GOLDEN / "wan-key-shapes.json").read_text(encoding="utf-8"))["vae21"]
    with torch.device("meta"):
        vae = WanVAE()
    assert {name: list(tensor.shape) for name, tensor in vae.state_dict().items()} == expected


@pytest.mark.parametrize("chunk", [2, 3, 8])
def test_encoding_in_larger_chunks_gives_the_same_latents(vae: WanVAE, chunk: int) -> None:
    pixels = random_clip(1, 3, 21, 16, 8)
    torch.testing.assert_close(vae.encode(pixels, chunk=chunk), vae.encode(pixels), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunk", [2, 3, 8])
def test_decoding_in_larger_chunks_gives_the_same_pixels(vae: WanVAE, chunk: int) -> None:
    latents = random_clip(1, 4, 6, 2, 1)
    torch.testing.assert_close(
        vae.decode_unclamped(latents, chunk=chunk), vae.decode_unclamped(latents), atol=2e-5, rtol=1e-5
    )


def test_a_batch_equals_its_clips_one_by_one(vae: WanVAE) -> None:
    pixels = random_clip(3, 3, 9, 16, 8)
    latents = vae.encode(pixels)
    torch.testing.assert_close(latents, torch.cat([vae.encode(clip) for clip in pixels.split(1)]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        vae.decode(latents), torch.cat([vae.decode(clip) for clip in latents.split(1)]), atol=1e-5, rtol=1e-5
    )


def test_the_latents_of_a_beginning_do_not_depend_on_what_follows(vae: WanVAE) -> None:
    pixels = random_clip(1, 3, 17, 16, 8)
    assert torch.equal(vae.encode(pixels, chunk=1)[:, :, :2], vae.encode(pixels[:, :, :5], chunk=1))


def test_later_frames_are_not_encoded_as_pictures(vae: WanVAE) -> None:
    pixels = random_clip(1, 3, 5, 16, 8)
    alone = vae.encode(pixels[:, :, 4:])
    assert (vae.encode(pixels)[:, :, 1:] - alone).abs().max() > 0.1


def test_one_clip_leaves_no_trace_in_the_next(vae: WanVAE) -> None:
    pixels = random_clip(1, 3, 9, 16, 8)
    before = vae.encode(pixels)
    vae.encode(random_clip(1, 3, 5, 16, 8, seed=2))
    assert torch.equal(vae.encode(pixels), before)


def test_latents_have_zero_mean_and_unit_variance_by_the_published_statistics() -> None:
    vae = random_vae(z=16)
    pixels = random_clip(1, 3, 1, 16, 8)
    cache = ChunkCache()
    mean = vae.conv1(vae.encoder(pixels, cache))[:, :16]
    expected = (mean - torch.tensor(VAE_MEAN)[:, None, None, None]) / torch.tensor(VAE_STD)[:, None, None, None]
    torch.testing.assert_close(vae.encode(pixels), expected)


def test_decoding_undoes_the_normalisation_and_clamps() -> None:
    vae = random_vae(z=16)
    latents = 3 * random_clip(1, 16, 2, 2, 1)
    raw = latents * torch.tensor(VAE_STD)[:, None, None, None] + torch.tensor(VAE_MEAN)[:, None, None, None]
    cache = ChunkCache()
    first = vae.decoder(vae.conv2(raw[:, :, :1]), cache)
    unclamped = vae.decode_unclamped(latents)
    torch.testing.assert_close(unclamped[:, :, :1], first, atol=1e-5, rtol=1e-5)
    assert unclamped.abs().max() > 1
    assert torch.equal(vae.decode(latents), unclamped.clamp(-1, 1))


def test_bfloat16_stays_near_float32() -> None:
    vae, rounded = random_vae(z=4), random_vae(z=4).bfloat16()
    pixels = random_clip(1, 3, 5, 16, 8)
    exact, latents = vae.encode(pixels), rounded.encode(pixels)
    assert latents.dtype == torch.bfloat16
    assert (latents.float() - exact).norm() < 0.05 * exact.norm()
    exact, frames = vae.decode_unclamped(exact), rounded.decode_unclamped(latents)
    assert frames.dtype == torch.bfloat16
    assert (frames.float() - exact).norm() < 0.1 * exact.norm()


def test_pixels_in_another_number_format_are_converted(vae: WanVAE) -> None:
    pixels = random_clip(1, 3, 5, 16, 8)
    assert torch.equal(vae.encode(pixels.double()), vae.encode(pixels))


def test_bytes_are_brought_to_minus_one_and_one(vae: WanVAE) -> None:
    clip = torch.randint(0, 256, (2, 5, 16, 8, 3), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    pixels = clip.permute(0, 4, 1, 2, 3)
    torch.testing.assert_close(vae.encode(pixels), vae.encode(pixels.contiguous().double() / 127.5 - 1))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("num_frames", [1, 5, 21])
def test_without_gradients_the_result_is_that_of_the_plain_layers(
    vae: WanVAE, num_frames: int, memory_format: torch.memory_format
) -> None:
    pixels = random_clip(2, 3, num_frames, 16, 16).contiguous(memory_format=memory_format)
    latents = vae.encode(pixels)
    cache, plain = ChunkCache(), []
    for start in range(0, num_frames, 4):
        cache.begin(first=start == 0, last=start + 1 == num_frames)
        frames = pixels[:, :, max(0, start - 3) : start + 1].contiguous()
        with torch.enable_grad():  # the statistics of four channels are left as they are
            plain.append(vae.conv1(vae.encoder(frames, cache))[:, :4])
    torch.testing.assert_close(latents, torch.cat(plain, dim=2), atol=1e-5, rtol=1e-5)


def test_a_chunk_is_as_large_as_memory_allows_and_no_larger_than_useful() -> None:
    with torch.device("meta"):
        vae = WanVAE().bfloat16()
    assert [vae.usual_chunk(width * height) for width, height in ((384, 208), (832, 480), (1280, 720))] == [2, 2, 1]
    assert vae.float().usual_chunk(832 * 480) == 1
    assert vae.usual_chunk(4 * 1280 * 720) == 1


@pytest.mark.parametrize(
    ("width", "height", "num_frames", "most"), [(768, 768, 1, 1.0), (768, 416, 21, 3.1), (384, 208, 45, 1.0)]
)
def test_memory_of_encoding_in_bf16_is_bounded(
    width: int, height: int, num_frames: int, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vae_layers, "activate_rows", lambda x, gamma, out: True)  # as where the kernel serves
    with torch.device("meta"):
        vae = WanVAE().bfloat16()
        pixels = torch.empty(1, num_frames, height, width, 3, dtype=torch.uint8).permute(0, 4, 1, 2, 3)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in vae.parameters())
    with Held() as held:
        vae.encode(pixels)
    assert (held.most + weights + pixels.numel()) / 2**30 < most


@pytest.mark.parametrize("num_frames", [2, 4, 7])
def test_frames_that_would_be_dropped_are_an_error(vae: WanVAE, num_frames: int) -> None:
    with pytest.raises(DataError, match="4k \\+ 1"):
        vae.encode(random_clip(1, 3, num_frames, 16, 8))


def test_sides_that_would_be_cut_are_an_error(vae: WanVAE) -> None:
    with pytest.raises(DataError, match="20x16"):
        vae.encode(random_clip(1, 3, 1, 16, 20))


def test_keeping_the_cache_in_main_memory_changes_nothing(vae: WanVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels, latents = random_clip(1, 3, 9, 16, 8), random_clip(1, 4, 3, 2, 1)
    plain = vae.encode(pixels), vae.decode(latents)
    monkeypatch.setattr(vae, "cache_on_cpu", True)
    assert torch.equal(vae.encode(pixels), plain[0])
    assert torch.equal(vae.decode(latents), plain[1])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeping_the_cache_in_main_memory_saves_device_memory_and_changes_nothing(dtype: torch.dtype) -> None:
    vae = random_vae(z=4).to("cuda", dtype)
    pixels = random_clip(1, 3, 9, 256, 256)
    results, peaks = [], []
    for vae.cache_on_cpu in (False, True, False, True):
        torch.cuda.reset_peak_memory_stats()
        latents = vae.encode(pixels)
        results.append((latents, vae.decode(latents)))
        peaks.append(torch.cuda.max_memory_allocated())
    assert all(torch.equal(mine, first) for result in results for mine, first in zip(result, results[0], strict=True))
    assert peaks[3] < peaks[2]


def test_the_cache_holds_two_frames_and_not_the_chunk_they_came_from() -> None:
    conv, cache = CausalConv3d(2, 2, (3, 3, 3)), ChunkCache()
    cache.begin(first=True, last=False)
    conv(torch.randn(1, 2, 8, 4, 4), cache)
    kept = cache.recall(conv, torch.empty(0))
    assert kept is not None
    assert kept.shape[2] == 2
    assert kept.untyped_storage().nbytes() == kept.numel() * kept.element_size()


def test_nothing_is_kept_of_the_last_chunk() -> None:
    conv, cache = CausalConv3d(2, 2, (3, 3, 3)), ChunkCache()
    cache.begin(first=True, last=True)
    conv(torch.randn(1, 2, 1, 4, 4), cache)
    assert cache.recall(conv, torch.empty(0)) is None
