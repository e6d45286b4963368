"""How much the loss of a sample counts, by its noise level.

The weight is a function of the exact t, whatever law drew it. Schemes named after a density (logit_normal, mode) shape
which t are drawn by the sampler "sigma" and weigh them all alike. Esser et al., 2403.03206, section 3.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from wanlora.foundation.registry import Registry

LOWEST_LEVEL = 1e-3
"""sigma_sqrt grows without bound towards t = 0; below this, the lowest of Wan's 1000 levels, it grows no more."""

LOSS_WEIGHTINGS: Registry[Callable[[Tensor], Tensor]] = Registry("weighting_scheme")


@LOSS_WEIGHTINGS.register("none", "logit_normal", "mode")
def even(t_B: Tensor) -> Tensor:
    """1 for every t."""
    return torch.ones_like(t_B)


@LOSS_WEIGHTINGS.register("sigma_sqrt")
def sigma_sqrt(t_B: Tensor) -> Tensor:
    """t^-2."""
    return t_B.clamp(min=LOWEST_LEVEL) ** -2


@LOSS_WEIGHTINGS.register("cosmap")
def cosmap(t_B: Tensor) -> Tensor:
    """2 / (pi (1 - 2 t + 2 t^2))."""
    return 2 / (math.pi * (1 - 2 * t_B + 2 * t_B**2))
