"""The adapter of one module as plain numbers: what files hold and what merging needs."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LoRAWeights:
    """`down` [r, in], `up` [out, r]; the update is alpha / r times up @ down."""

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """Rows of `down`."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.alpha / self.rank

    def delta(self, device: torch.device | None = None) -> Tensor:
        """The update of the weight, [out, in] float32."""
        device = device or self.up.device
        return (self.up.to(device, torch.float32) * self.scale) @ self.down.to(device, torch.float32)

    def applied(self, x: Tensor) -> Tensor:
        """The update times `x` [in], [out] float64, without forming the product of the factors."""
        return self.scale * (self.up.double() @ (self.down.double() @ x.double()))
