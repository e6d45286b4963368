"""The transformer equals diffusers' on random weights: outputs, gradients, and what bfloat16 costs.

Every parameter is random, for released models start with zero biases and a zero head. diffusers makes its sinusoid in
float32, which is off by 1e-5 at t near 1000; it is given ours, which is made in float64 as the official one is.
"""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from diffusers.models import embeddings
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from wanlora.lora.network import LoRANetwork, inject
from wanlora.lora.targets import select_targets
from wanlora.models.wan.keys import official_to_diffusers
from wanlora.models.wan.layers import sinusoid
from wanlora.models.wan.spec import WanSizes
from wanlora.models.wan.transformer import WanTransformer

HEADS_OF_32 = WanSizes(dim=96, ffn_dim=160, num_layers=3, freq_dim=64, text_dim=48, head_dim=32)
HEADS_OF_128 = WanSizes(dim=256, ffn_dim=160, num_layers=2, freq_dim=64, text_dim=48)
LATENTS = (16, 3, 8, 12)


@pytest.fixture(autouse=True)
def _float64_sinusoid(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def replacement(timesteps: Tensor, embedding_dim: int, **_: object) -> Tensor:
        return sinusoid(timesteps, embedding_dim)

    monkeypatch.setattr(embeddings, "get_timestep_embedding", replacement)
    yield


def randomise(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)


def pair(sizes: WanSizes) -> tuple[WanTransformer, nn.Module]:
    """Ours and diffusers' with the same weights."""
    ours = WanTransformer(sizes)
    randomise(ours)
    theirs = WanTransformer3DModel(
        num_attention_heads=sizes.num_heads,
        attention_head_dim=sizes.head_dim,
        in_channels=sizes.in_channels,
        out_channels=sizes.out_channels,
        text_dim=sizes.text_dim,
        freq_dim=sizes.freq_dim,
        ffn_dim=sizes.ffn_dim,
        num_layers=sizes.num_layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        eps=sizes.eps,
    )
    theirs.load_state_dict({official_to_diffusers(name): value for name, value in ours.state_dict().items()})
    return ours, theirs


def inputs(batch: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, *LATENTS, generator=generator)
    timestep = torch.tensor([999.0, 37.5, 500.0])[:batch]
    text = [torch.randn(rows, 48, generator=generator) for rows in (7, 512, 100)[:batch]]
    return x, timestep, text


def oracle(model: nn.Module, x: Tensor, timestep: Tensor, text: list[Tensor]) -> Tensor:
    padded = torch.stack([F.pad(one, (0, 0, 0, 512 - len(one))) for one in text])
    out: Tensor = model(x, timestep, padded, return_dict=False)[0]
    return out


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("sizes", [HEADS_OF_32, HEADS_OF_128], ids=["head32", "head128"])
@pytest.mark.parametrize("batch", [1, 2])
def test_velocity_equals_diffusers(sizes: WanSizes, batch: int) -> None:
    ours, theirs = pair(sizes)
    with torch.no_grad():
        expected = oracle(theirs, *inputs(batch))
        found = ours(*inputs(batch))
    assert found.dtype == torch.float32
    assert expected.abs().max() > 1
    assert (found - expected).abs().max() < 1e-5


def test_gradients_of_input_and_of_every_weight_equal_diffusers() -> None:
    ours, theirs = pair(HEADS_OF_32)
    x, timestep, text = inputs(2)
    target = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    x_ours, x_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    F.mse_loss(ours(x_ours, timestep, text), target).backward()
    F.mse_loss(oracle(theirs, x_theirs, timestep, text), target).backward()
    assert x_ours.grad is not None and x_theirs.grad is not None
    assert relative(x_ours.grad, x_theirs.grad) < 1e-4
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        reference = expected[official_to_diffusers(name)].grad
        assert parameter.grad is not None and reference is not None, name
        assert relative(parameter.grad, reference) < 1e-4, name


def test_samples_of_a_batch_do_not_touch_each_other() -> None:
    ours, _ = pair(HEADS_OF_32)
    x, timestep, text = inputs(3)
    with torch.no_grad():
        together = ours(x, timestep, text)
        alone = ours(x[1:2], timestep[1:2], text[1:2])
    torch.testing.assert_close(together[1:2], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_maths_stay_close_and_a_float32_residual_is_closer(dtype: torch.dtype) -> None:
    sizes = WanSizes(dim=384, ffn_dim=512, num_layers=10, freq_dim=64, text_dim=48)
    exact = WanTransformer(sizes)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in exact.named_parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5, generator=generator)
        elif not name.endswith("norm_q.weight") and not name.endswith("norm_k.weight"):
            nn.init.normal_(parameter, std=0.1, generator=generator)
    with torch.no_grad():
        expected = exact(*inputs(1))
        errors = {}
        for residual in (torch.float32, dtype):
            rounded = WanTransformer(sizes, compute_dtype=dtype, residual_dtype=residual)
            rounded.load_state_dict(exact.state_dict())
            errors[residual] = relative(rounded(*inputs(1)), expected)
    assert errors[dtype] < 2e-2
    assert errors[torch.float32] < 0.8 * errors[dtype]


def test_gradients_of_lora_factors_equal_those_of_peft() -> None:
    ours, theirs = pair(HEADS_OF_32)
    network = inject(
        ours, select_targets(ours), rank=4, alpha=8.0, generator=torch.Generator().manual_seed(2), device=None
    )
    targets = [official_to_diffusers(name) for name in network.adapters]
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=8, target_modules=targets), theirs)
    factors = lora_factors(network, theirs)
    generator = torch.Generator().manual_seed(3)
    for mine, other in factors.values():
        nn.init.normal_(mine, std=0.1, generator=generator)
        other.data.copy_(mine.data)
    x, timestep, text = inputs(2)
    target = torch.randn(x.shape, generator=generator)
    losses = [
        F.mse_loss(ours.train()(x, timestep, text), target),
        F.mse_loss(oracle(theirs.train(), x, timestep, text), target),
    ]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    sum(losses).backward()  # type: ignore[union-attr]
    assert len(factors) == 2 * 10 * HEADS_OF_32.num_layers
    for name, (mine, other) in factors.items():
        assert mine.grad is not None and other.grad is not None
        assert relative(mine.grad, other.grad) < 1e-4, name


def lora_factors(network: LoRANetwork, theirs: nn.Module) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """Ours and peft's parameter for every factor, by our name."""
    parameters = dict(theirs.named_parameters())
    return {
        f"{name}.{ours}": (
            getattr(adapter, ours).weight,
            parameters[f"{official_to_diffusers(name)}.{peft}.default.weight"],
        )
        for name, adapter in network.adapters.items()
        for ours, peft in (("lora_down", "lora_A"), ("lora_up", "lora_B"))
    }
