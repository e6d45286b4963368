"""Distributions of the noise level on [0, 1], each given by its quantile function and its distribution function.

Drawing is `quantile(u)` with u uniform. The usual code draws normals and mixes or rejects them; here every law, a
mixture or a truncated one too, is one increasing function of one uniform number. So strata of u stay strata of t, a
range is cut out exactly instead of by trial, and the share of draws in any band is known without drawing.

All tensors are float64: a range near either end holds as little as 1e-9 of some laws.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from wanlora.diffusion.flow import shift_time


class Law(Protocol):
    """A distribution on [0, 1]."""

    def quantile(self, u: Tensor) -> Tensor:
        """The t below which a share u of the draws lies; increasing in u. Any shape, float64."""

    def cdf(self, t: Tensor) -> Tensor:
        """The share of draws at or below t. Any shape, float64."""


@dataclass(frozen=True, slots=True)
class Uniform:
    """Every noise level alike."""

    def quantile(self, u: Tensor) -> Tensor:
        return u

    def cdf(self, t: Tensor) -> Tensor:
        return t.clamp(0, 1)


@dataclass(frozen=True, slots=True)
class LogitNormal:
    """sigmoid(loc + scale z), z standard normal. Adding log(s) to `loc` is shifting time by s."""

    loc: float
    scale: float

    def quantile(self, u: Tensor) -> Tensor:
        return torch.sigmoid(self.loc + self.scale * torch.special.ndtri(u))

    def cdf(self, t: Tensor) -> Tensor:
        return torch.special.ndtr((torch.logit(t.clamp(0, 1)) - self.loc) / self.scale)


@dataclass(frozen=True, slots=True)
class Mode:
    """The heavy-tailed density of Esser et al., 2403.03206, eq. 20: more of the middle for `scale` > 0."""

    scale: float

    def quantile(self, u: Tensor) -> Tensor:
        return u + self.scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)

    def cdf(self, t: Tensor) -> Tensor:
        return _inverse(self.quantile, t)


@dataclass(frozen=True, slots=True)
class Shifted:
    """Draws of `base`, shifted in time."""

    base: Law
    shift: float

    def quantile(self, u: Tensor) -> Tensor:
        return shift_time(self.base.quantile(u), self.shift)

    def cdf(self, t: Tensor) -> Tensor:
        return self.base.cdf(shift_time(t.clamp(0, 1), 1 / self.shift))


@dataclass(frozen=True, slots=True)
class Mixture:
    """Each part with its share; the shares sum to 1."""

    parts: tuple[tuple[float, Law], ...]

    def quantile(self, u: Tensor) -> Tensor:
        return _inverse(self.cdf, u)

    def cdf(self, t: Tensor) -> Tensor:
        return torch.stack([share * law.cdf(t) for share, law in self.parts]).sum(0)


@dataclass(frozen=True, slots=True)
class Squeezed:
    """`base` mapped linearly onto [low, high]: the range narrows, the shape moves with it."""

    base: Law
    low: float
    high: float

    def quantile(self, u: Tensor) -> Tensor:
        return self.low + (self.high - self.low) * self.base.quantile(u)

    def cdf(self, t: Tensor) -> Tensor:
        return self.base.cdf(((t - self.low) / (self.high - self.low)).clamp(0, 1))


@dataclass(frozen=True, slots=True)
class Truncated:
    """`base` given that it falls into [low, high]: what rejecting every other draw would yield."""

    base: Law
    low: float
    high: float

    @property
    def mass(self) -> float:
        """The share of draws of `base` that fall into the range."""
        below, upto = self._ends()
        return float(upto - below)

    def quantile(self, u: Tensor) -> Tensor:
        below, upto = self._ends()
        return self.base.quantile(below + (upto - below) * u).clamp(self.low, self.high)

    def cdf(self, t: Tensor) -> Tensor:
        below, upto = self._ends()
        return (self.base.cdf(t.clamp(self.low, self.high)) - below) / (upto - below)

    def _ends(self) -> Tensor:
        return self.base.cdf(torch.tensor([self.low, self.high], dtype=torch.float64))


def _inverse(function: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
    """Where an increasing function on [0, 1] takes `value`, by halving the interval down to float64's resolution."""
    low, high = torch.zeros_like(value), torch.ones_like(value)
    for _ in range(54):
        middle = (low + high) / 2
        too_low = function(middle) < value
        low, high = torch.where(too_low, middle, low), torch.where(too_low, high, middle)
    return (low + high) / 2
