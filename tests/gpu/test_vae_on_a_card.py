"""The autoencoder as cards compute it: channels last, norm and SiLU in one kernel, latents copied back later, tiles."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from wanlora.caching.encoding import LatentEncoder
from wanlora.memory.fitting import FittedVAE
from wanlora.memory.limit import free_for_tensors
from wanlora.models.wan.vae import VAESizes, WanVAE, _put_channels_last
from wanlora.models.wan.vae_kernels import activate_rows
from wanlora.models.wan.vae_tiles import WHOLE, Tiling

pytestmark = pytest.mark.gpu

CARD = torch.device("cuda", 0)


@pytest.fixture
def vae() -> WanVAE:
    torch.manual_seed(0)
    return WanVAE(VAESizes(base=16)).eval()


@pytest.mark.parametrize("shape", [(1, 96, 3, 5, 7), (2, 192, 1, 4, 4), (3, 384, 4, 3, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_is_the_operations(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, device=CARD, dtype=dtype).contiguous(memory_format=torch.channels_last_3d)
    x[0, :, 0, 0, 0] = 0
    gamma = torch.rand(shape[1], 1, 1, 1, device=CARD, dtype=dtype) + 0.5
    longer = (*shape[:2], shape[2] + 2, *shape[3:])
    beside = torch.full(longer, 7.0, device=CARD, dtype=dtype).contiguous(memory_format=torch.channels_last_3d)
    assert activate_rows(x, gamma, beside[:, :, 2:])
    expected = F.silu(F.normalize(x.float(), dim=1) * gamma.float() * shape[1] ** 0.5)
    torch.testing.assert_close(
        beside[:, :, 2:], expected.to(dtype), atol=1e-5 if dtype == torch.float32 else 0.02, rtol=0.01
    )
    assert (beside[:, :, :2] == 7).all()


def on_card(vae: WanVAE, dtype: torch.dtype) -> WanVAE:
    vae = vae.to(CARD, dtype)
    _put_channels_last(vae)
    return vae


def test_latents_of_the_card_are_those_of_the_processor(vae: WanVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    pixels = torch.randint(0, 256, (2, 3, 21, 64, 48), dtype=torch.uint8)
    expected = vae.encode(pixels)
    latents = on_card(vae, torch.float32).encode(pixels)
    torch.testing.assert_close(latents.cpu(), expected, atol=1e-4, rtol=1e-4)
    rough: Tensor = vae.bfloat16().encode(pixels).float().cpu()
    assert (rough - expected).norm() < 0.05 * expected.norm()


def test_latents_that_are_fetched_late_are_those_of_their_clip(vae: WanVAE) -> None:
    encoder = LatentEncoder(on_card(vae, torch.bfloat16), storage=torch.bfloat16)
    clips = [np.random.default_rng(seed).integers(0, 256, (5, 64, 48, 3), dtype=np.uint8) for seed in range(6)]
    at_once = [encoder.encode([clip]).latents()[0] for clip in clips]
    begun = [encoder.encode([clip]) for clip in clips]
    assert all(torch.equal(later.latents()[0], first) for later, first in zip(begun, at_once, strict=True))


def needed(work: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """What `work` returns, and the bytes that it took at most beyond those that were taken before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = work()
    return result, torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_give_the_same_with_less_memory(vae: WanVAE, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    vae = on_card(vae, dtype)
    pixels = torch.randint(0, 256, (1, 3, 13, 480, 416), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    results: list[tuple[Tensor, Tensor]] = []
    peaks = []
    for tiling in (WHOLE, Tiling(3, 3), WHOLE, Tiling(3, 3)):  # kernels are chosen and checked in the first two
        latents, encoded = needed(partial(vae.encode, pixels, tiling=tiling))
        frames, decoded = needed(partial(vae.decode_unclamped, results[0][0] if results else latents, tiling=tiling))
        peaks.append((encoded, decoded))
        results.append((latents, frames))
    allowed = 1e-4 if dtype == torch.float32 else 0.03
    for tiled, whole in zip(results[1], results[0], strict=True):
        assert (tiled.float() - whole.float()).norm() < allowed * whole.float().norm()
    (encoded, decoded), (encoded_whole, decoded_whole) = peaks[3], peaks[2]
    assert encoded < 0.6 * encoded_whole
    # In float32 a tile of so small a decoder was seen to take 601 MB, the frame 681: more than its tensors hold.
    assert decoded < (0.6 if dtype == torch.bfloat16 else 1) * decoded_whole


def test_a_card_that_is_full_gets_tiles(vae: WanVAE) -> None:
    vae = on_card(vae, torch.bfloat16)
    pixels = torch.randint(0, 256, (1, 3, 5, 480, 832), dtype=torch.uint8)
    expected, whole = needed(partial(FittedVAE(vae).encode, pixels))
    free = free_for_tensors(CARD)
    assert free is not None and 0 < free < torch.cuda.get_device_properties(CARD).total_memory
    latents, tiled = needed(partial(FittedVAE(vae, room=lambda device: 100 * 2**20).encode, pixels))
    assert tiled < 0.6 * whole
    assert (latents.float() - expected.float()).norm() < 0.03 * expected.float().norm()


def test_memory_that_runs_out_on_a_card_leads_to_tiles(vae: WanVAE) -> None:
    vae = on_card(vae, torch.bfloat16)
    pixels = torch.randint(0, 256, (1, 3, 13, 720, 1280), dtype=torch.uint8)
    expected = vae.encode(pixels)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(CARD).total_memory
    held = torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction((held + 400 * 2**20) / total, CARD)
    try:
        latents = FittedVAE(vae, room=lambda device: total).encode(pixels)  # nobody knows of the limit
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, CARD)
    assert (latents.float() - expected.float()).norm() < 0.03 * expected.float().norm()
