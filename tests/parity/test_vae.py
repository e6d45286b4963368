"""The Wan 2.1 autoencoder against the one in diffusers, on small random weights."""

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from wanlora.models.wan.vae import VAESizes, WanVAE
from wanlora.models.wan.vae_keys import diffusers_name

Pair = tuple[WanVAE, AutoencoderKLWan]


@pytest.fixture(scope="module")
def pair() -> Pair:
    """Both models with the same weights, none of them at its initial zero or one."""
    generator = torch.Generator().manual_seed(0)
    ours = WanVAE(VAESizes(base=16, z=4)).eval()
    for name, parameter in ours.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(1 + 0.2 * noise if name.endswith("gamma") else noise * (parameter[0].numel() ** -0.5))
    peer = AutoencoderKLWan(base_dim=16, z_dim=4).eval()
    peer.load_state_dict({diffusers_name(name): tensor for name, tensor in ours.state_dict().items()}, strict=True)
    return ours, peer


def random_clip(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)


@pytest.mark.parametrize("num_frames", [1, 5, 21])
def test_encoding_equals_diffusers(pair: Pair, num_frames: int) -> None:
    ours, peer = pair
    pixels = random_clip(1, 3, num_frames, 32, 48)
    with torch.no_grad():
        expected = peer.encode(pixels).latent_dist.mode()
    torch.testing.assert_close(ours.encode(pixels), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_latents", [1, 2, 6])
def test_decoding_equals_diffusers_before_the_clamp(
    pair: Pair, num_latents: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, peer = pair
    latents = random_clip(1, 4, num_latents, 4, 6)
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(torch, "clamp", lambda x, **_: x)
        expected = peer.decode(latents).sample
    assert expected.abs().max() > 1
    torch.testing.assert_close(ours.decode_unclamped(latents), expected, atol=1e-5, rtol=1e-5)
