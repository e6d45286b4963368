"""The VAE's numbers on the way to disk."""

import numpy as np
import pytest
import torch

from tests.tiny import TinyWan
from wanlora.caching.encoding import LatentEncoder
from wanlora.models.wan.vae import load_vae


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_latents_are_given_in_the_storage_format(tiny_models: TinyWan, storage: torch.dtype) -> None:
    encoder = LatentEncoder(load_vae(tiny_models.vae, device="cpu"), storage=storage)
    clip = np.random.default_rng(0).integers(0, 256, (5, 32, 48, 3), dtype=np.uint8)
    first, second = encoder.encode([clip, clip[::-1].copy()]).latents()
    assert first.shape == second.shape == (16, 2, 4, 6)
    assert first.dtype == storage
    assert not torch.equal(first, second)
    assert encoder.maths == torch.float32


def test_cudnn_is_off_while_encoding_and_only_then(tiny_models: TinyWan, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = load_vae(tiny_models.vae, device="cpu")
    seen: list[bool] = []
    encode = vae.encode

    def watched(pixels: torch.Tensor) -> torch.Tensor:
        seen.append(torch.backends.cudnn.enabled)
        return encode(pixels)

    monkeypatch.setattr(vae, "encode", watched)
    clip = np.zeros((1, 32, 32, 3), dtype=np.uint8)
    for cudnn in (True, False):
        LatentEncoder(vae, storage=torch.bfloat16, cudnn=cudnn).encode([clip])
    assert seen == [True, False]
    assert torch.backends.cudnn.enabled
