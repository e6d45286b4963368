"""The straight path between data (t = 0) and noise (t = 1) that Wan is trained on.

t is the noise level, a share: x_t = (1 - t) x0 + t x1. Along the path the velocity dx/dt = x1 - x0 is constant, and it
is what the model predicts. The model itself is told 1000 t, as in the official code (Wan2.1/wan/text2video.py).
Lipman et al., "Flow Matching for Generative Modeling", 2210.02747; Liu et al., "Flow Straight and Fast", 2209.03003.
"""

from typing import TypeVar

from einops import rearrange
from torch import Tensor

TIMESTEP_SCALE = 1000
"""The model's clock runs from 0 (data) to 1000 (noise)."""

FloatOrTensor = TypeVar("FloatOrTensor", float, Tensor)


def interpolate(x0_BCFHW: Tensor, x1_BCFHW: Tensor, t_B: Tensor) -> Tensor:
    """x_t = (1 - t) x0 + t x1, in the widest dtype of the three."""
    t_B1111 = rearrange(t_B, "b -> b 1 1 1 1")
    return (1 - t_B1111) * x0_BCFHW + t_B1111 * x1_BCFHW


def velocity(x0_BCFHW: Tensor, x1_BCFHW: Tensor) -> Tensor:
    """x1 - x0: what the model learns to predict, at every t."""
    return x1_BCFHW - x0_BCFHW


def x0_from_velocity(xt_BCFHW: Tensor, velocity_BCFHW: Tensor, t_B: Tensor) -> Tensor:
    """x_t - t v: the data that a predicted velocity points to."""
    return xt_BCFHW - rearrange(t_B, "b -> b 1 1 1 1") * velocity_BCFHW


def model_timestep(t_B: Tensor) -> Tensor:
    """The model's clock at noise level t: 1000 t, not rounded."""
    return t_B * TIMESTEP_SCALE


def shift_time(t: FloatOrTensor, shift: float) -> FloatOrTensor:
    """s t / (1 + (s - 1) t): moves noise levels towards 1 for s > 1; 0 and 1 stay. Esser et al., 2403.03206, eq. 23."""
    return shift * t / (1 + (shift - 1) * t)
