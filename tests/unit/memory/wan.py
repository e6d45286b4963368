"""A small Wan with adapters and fp8 layers, and a training step of it."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from wanlora.lora.layers import LoRALinear
from wanlora.models.wan.spec import WanSizes
from wanlora.models.wan.transformer import WanTransformer
from wanlora.quantization.linear import Fp8Linear

_GENERATOR = torch.Generator().manual_seed(1)
ARGUMENTS = (
    torch.randn(1, 16, 2, 4, 4, generator=_GENERATOR),
    torch.tensor([300.0]),
    [torch.randn(5, 32, generator=_GENERATOR)],
)


def adapted_wan(
    num_blocks: int = 6, *, dropout: float = 0.0, adapted: bool = True, text_len: int = 7
) -> WanTransformer:
    """The same weights at every call. Self attention is fp8; every linear of the blocks has an adapter."""
    sizes = WanSizes(
        dim=128,
        ffn_dim=192,
        num_layers=num_blocks,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=32,
        text_len=text_len,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = WanTransformer(sizes).requires_grad_(False)
    generator = torch.Generator().manual_seed(2)
    for name, linear in [*model.blocks.named_modules()]:
        if isinstance(linear, nn.Linear):
            base = Fp8Linear.quantized(linear) if "self_attn" in name else linear
            layer = LoRALinear(base, rank=4, scale=1.0, generator=generator, dropout=dropout) if adapted else base
            if isinstance(layer, LoRALinear):
                nn.init.normal_(layer.lora_up.weight, std=0.02, generator=generator)
            model.blocks.set_submodule(name, layer)
    return model


def train_step(model: WanTransformer, arguments: tuple[Tensor, Tensor, list[Tensor]] = ARGUMENTS) -> float:
    """Forward and backward; the loss."""
    loss = model(*arguments).square().mean()
    loss.backward()
    return loss.item()


def losses_and_gradients(
    model: WanTransformer, *, steps: int = 3, between: Callable[[], None] = lambda: None
) -> list[float]:
    """Losses of several optimizer steps, then every value of the last step's gradients."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    seen = []
    for _ in range(steps):
        optimizer.zero_grad()
        seen.append(train_step(model))
        optimizer.step()
        between()
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    assert len(gradients) == len(trained) > 0
    return seen + [value for gradient in gradients for value in gradient.flatten().tolist()]
