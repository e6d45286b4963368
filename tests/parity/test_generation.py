"""Whole generation, noise to frames, against the Wan pipeline in diffusers, on small random weights."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from torch import Tensor

from wanlora.diffusion.solvers import UNIPC_START
from wanlora.foundation.shapes import LatentShape
from wanlora.generation.pipeline import decode_frames, initial_noise, sample_latents
from wanlora.models.wan.keys import official_to_diffusers
from wanlora.models.wan.spec import WanSizes
from wanlora.models.wan.transformer import WanTransformer
from wanlora.models.wan.vae import VAESizes, WanVAE
from wanlora.models.wan.vae_keys import diffusers_name

SIZES = WanSizes(dim=96, ffn_dim=160, num_layers=2, head_dim=32, text_dim=48, freq_dim=64)
LATENT = LatentShape(frames=2, height=6, width=8)


class OfficialGrid(UniPCMultistepScheduler):
    """UniPC on the grid of the official code in place of diffusers' own."""

    def set_timesteps(self, num_inference_steps: int, device: Any = None, **_: Any) -> None:
        super().set_timesteps(device=device, sigmas=np.linspace(UNIPC_START, 0, num_inference_steps + 1)[:-1])
        self.set_begin_index(0)


def _randomise(model: torch.nn.Module, seed: int) -> None:
    """Give every parameter a random value, so that nothing is hidden by an initial zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_scale = name.endswith(("gamma", "norm_q.weight", "norm_k.weight", "norm3.weight"))
            parameter.copy_(1 + 0.2 * noise if is_scale else noise * max(parameter[0].numel(), 4) ** -0.5)


@pytest.fixture(scope="module")
def ours() -> tuple[WanTransformer, WanVAE]:
    transformer, vae = WanTransformer(SIZES).eval(), WanVAE(VAESizes(base=16, z=16)).eval()
    _randomise(transformer, 0)
    _randomise(vae, 1)
    return transformer, vae


@pytest.fixture(scope="module")
def theirs(ours: tuple[WanTransformer, WanVAE]) -> Any:
    """A diffusers pipeline that holds the same weights."""
    transformer = WanTransformer3DModel(
        num_attention_heads=SIZES.num_heads,
        attention_head_dim=SIZES.head_dim,
        in_channels=16,
        out_channels=16,
        text_dim=SIZES.text_dim,
        freq_dim=SIZES.freq_dim,
        ffn_dim=SIZES.ffn_dim,
        num_layers=SIZES.num_layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    ).eval()
    vae = AutoencoderKLWan(base_dim=16, z_dim=16).eval()
    transformer.load_state_dict({official_to_diffusers(name): value for name, value in ours[0].state_dict().items()})
    vae.load_state_dict({diffusers_name(name): value for name, value in ours[1].state_dict().items()})
    scheduler = OfficialGrid(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    pipeline = WanPipeline(tokenizer=None, text_encoder=None, vae=vae, scheduler=scheduler, transformer=transformer)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _text(num_tokens: int, seed: int) -> Tensor:
    return torch.randn(num_tokens, SIZES.text_dim, generator=torch.Generator().manual_seed(seed))


def _padded(text: Tensor) -> Tensor:
    return torch.cat([text, text.new_zeros(SIZES.text_len - len(text), SIZES.text_dim)])[None]


@pytest.mark.parametrize(("steps", "guidance"), [(4, 5.0), (6, 1.0)])
def test_a_clip_equals_that_of_diffusers(
    ours: tuple[WanTransformer, WanVAE], theirs: Any, steps: int, guidance: float
) -> None:
    transformer, vae = ours
    text, negative = _text(9, 2), _text(5, 3)
    pixels = LATENT.pixels()
    shared: dict[str, Any] = {
        "prompt_embeds": _padded(text),
        "negative_prompt_embeds": _padded(negative),
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "width": pixels.width,
        "height": pixels.height,
        "num_frames": pixels.frames,
    }
    expected_latents = theirs(**shared, latents=initial_noise(LATENT, seed=4), output_type="latent").frames[0]
    latents = sample_latents(
        transformer, text, negative, latent=LATENT, steps=steps, shift=5.0, guidance=guidance, seed=4, device="cpu"
    )
    assert expected_latents.std() > 0.1
    torch.testing.assert_close(latents, expected_latents, atol=1e-4, rtol=1e-4)

    expected_frames = theirs(**shared, latents=initial_noise(LATENT, seed=4), output_type="np").frames[0]
    frames = decode_frames(vae, latents)
    assert expected_frames.std() > 0.02
    assert np.abs(frames / 255 - expected_frames).max() < 0.5 / 255 + 1e-3
