"""A tiny transformer with random weights, and adapters that do something."""

import torch
from torch import Tensor

from wanlora.lora.network import LoRANetwork, inject
from wanlora.lora.targets import select_targets
from wanlora.models.wan.spec import WanSizes
from wanlora.models.wan.transformer import WanTransformer

SIZES = WanSizes(dim=64, ffn_dim=96, num_layers=2, text_dim=24, freq_dim=32, head_dim=32)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny_wan(seed: int = 0) -> WanTransformer:
    """No parameter is zero, so every layer shows in the output."""
    model = WanTransformer(SIZES)
    generator = seeded(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return model


def adapted_wan(
    *, rank: int = 4, alpha: float | None = None, include: tuple[str, ...] = (), strength: float = 0.1, seed: int = 0
) -> LoRANetwork:
    """Adapters on the tiny transformer; with a `strength` above 0 they change its output."""
    model = tiny_wan()
    network = inject(model, select_targets(model, include), rank=rank, alpha=alpha, generator=seeded(seed))
    generator = seeded(seed + 1)
    for adapter in network.adapters.values():
        torch.nn.init.normal_(adapter.lora_up.weight, std=strength, generator=generator)
    return network


def inputs() -> tuple[Tensor, Tensor, list[Tensor]]:
    """Latents, timestep and text for one call."""
    generator = seeded(7)
    latents = torch.randn(1, 16, 2, 4, 6, generator=generator)
    return latents, torch.tensor([417.0]), [torch.randn(5, SIZES.text_dim, generator=generator)]
