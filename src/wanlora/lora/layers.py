"""A frozen linear layer and a small trained update beside it.

LoRA (arXiv:2106.09685) keeps W as it is and learns y = W x + m (alpha / r) B A x with A of r rows and B of r columns.
A starts random and B at zero, so an untrained adapter changes nothing. The two factors are kept in float32, because an
optimizer step is often smaller than the spacing of bfloat16 numbers, and are cast to the activation's format at every
call, or once for all calls of a training step (`narrow.py`). The factor m alpha / r goes into B before that cast, so it
is rounded once and the wide activations are never multiplied. The base may be any module with `in_features` and
`out_features`, quantised or not: only its output is used.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanlora.lora.drawing import draw_down
from wanlora.models.wan.layers import project


class Factor(nn.Module):
    """One of the two trained matrices, [rows, columns] float32."""

    narrow: nn.Parameter | None
    """While it is lent: the matrix, times its strength, in the format of the activations."""

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rows, columns, dtype=torch.float32, device=device))
        self.lend(None)

    def lend(self, narrow: nn.Parameter | None) -> None:
        """Compute with `narrow` from now on, or with what `weight` is."""
        # Not as a parameter of the module: it is neither trained, saved, moved nor counted with them.
        object.__setattr__(self, "narrow", narrow)

    def times(self, strength: float) -> Tensor:
        """The matrix times `strength`; what is lent has been multiplied by it."""
        if self.narrow is not None:
            return self.narrow
        return self.weight if strength == 1 else self.weight * strength


class LoRALinear(nn.Module):
    """`base` plus `multiplier * scale * up(down(x))`; the sum has the base's output format.

    Parameters are `lora_down.weight` [rank, in] and `lora_up.weight` [out, rank]. `generator` (on the CPU) draws the
    initial `lora_down` unless it is given as `down`; the global generator is left alone. `multiplier` 0 gives the
    base's output bit for bit.

    While training, three kinds of dropout may act: `dropout` on single rank activations, `rank_dropout` on whole ranks
    of a sample (survivors grow by 1 / (1 - p)), `module_dropout` on the whole update of a call. The last draws from the
    CPU's default generator, the others from that of the activation's device.
    """

    def __init__(
        self,
        base: nn.Module,
        *,
        rank: int,
        scale: float,
        generator: torch.Generator,
        down: Tensor | None = None,
        dropout: float = 0.0,
        rank_dropout: float = 0.0,
        module_dropout: float = 0.0,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = linear_size(base)
        if rank < 1:
            raise ValueError(f"an adapter has a rank of at least 1, got {rank}")
        for name, value in (("dropout", dropout), ("rank_dropout", rank_dropout), ("module_dropout", module_dropout)):
            if not 0 <= value < 1:
                raise ValueError(f"{name} is a probability below 1, got {value}")
        device = device or device_of(base)
        self.base = base
        self.rank = rank
        self.scale = scale
        self.multiplier = 1.0
        self.dropout, self.rank_dropout, self.module_dropout = dropout, rank_dropout, module_dropout
        self.lora_down = Factor(rank, self.in_features, device)
        self.lora_up = Factor(self.out_features, rank, device)
        if device.type != "meta":
            self.lora_down.weight.data.copy_(draw_down(rank, self.in_features, generator) if down is None else down)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        return self.together(x, (self,))[0]

    @staticmethod
    def together(x: Tensor, layers: "Sequence[LoRALinear]") -> tuple[Tensor, ...]:
        """Several layers of one input: it is read once for all their down factors (see `project`)."""
        outs = project(x, [layer.base for layer in layers])
        if all(layer.strength == 0 for layer in layers):
            return outs
        downs = [layer.lora_down.times(1) for layer in layers]
        hidden = F.linear(x, (torch.cat(downs) if len(downs) > 1 else downs[0]).to(x.dtype))
        parts = hidden.split([len(down) for down in downs], dim=-1)
        return tuple(layer._updated(out, part) for layer, out, part in zip(layers, outs, parts, strict=True))

    @property
    def strength(self) -> float:
        """What the product of the factors is multiplied by."""
        return self.multiplier * self.scale

    def _updated(self, out: Tensor, hidden: Tensor) -> Tensor:
        """The base's output plus the up factor's share."""
        if self.strength == 0:
            return out
        if self.training:
            hidden = self._drop(hidden)
        up = self.lora_up.times(self.strength).to(hidden.dtype)
        return out + F.linear(hidden, up).to(out.dtype)

    def _drop(self, hidden: Tensor) -> Tensor:
        """Dropout on the rank activations [B, ..., r]."""
        if self.dropout:
            hidden = F.dropout(hidden, self.dropout)
        if self.rank_dropout:
            shape = (hidden.shape[0], *[1] * (hidden.ndim - 2), self.rank)
            kept = torch.rand(shape, device=hidden.device) >= self.rank_dropout
            hidden = hidden * (kept / (1 - self.rank_dropout)).to(hidden.dtype)
        if self.module_dropout:
            # A product, not a branch: every parameter gets a gradient at every step and a compiled graph stays whole.
            hidden = hidden * (torch.rand(()) >= self.module_dropout).to(hidden.dtype)
        return hidden

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:g}"


def is_linear(module: nn.Module) -> bool:
    """Whether `module` maps [..., in_features] to [..., out_features] and is no adapter itself."""
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    return not isinstance(module, LoRALinear) and all(isinstance(size, int) for size in sizes)


def linear_size(module: nn.Module) -> tuple[int, int]:
    """(in_features, out_features). Raises `TypeError` for a module that is not linear or already adapted."""
    if not is_linear(module):
        raise TypeError(f"a LoRA goes on a linear layer, not on {type(module).__name__}")
    sized: Any = module
    return sized.in_features, sized.out_features


def device_of(module: nn.Module) -> torch.device:
    """Where a layer's weights are."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")
