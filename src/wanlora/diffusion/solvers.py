"""Walking from noise back to data in few steps.

Each solver holds its grid of noise levels t[0] > ... > t[steps] = 0 and the integer clock values that the model is told
(1000 t, truncated), and turns the velocity predicted at t[i] into the state at t[i + 1]. The grids are those of the
official Wan code (wan/utils/fm_solvers_unipc.py, fm_solvers.py), truncation included.

UniPC and DPM++ are multistep: they remember earlier predictions of the data. A solver therefore serves one trajectory,
counts its own steps (two neighbouring steps may carry the same clock value) and lets go of what it remembers at the
last one. States are float32 whatever the model computes in; coefficients are Python floats.

In all of them lambda(t) = log((1 - t) / t) is half the log signal-to-noise ratio, and h the growth of lambda in a step.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from wanlora.diffusion.flow import TIMESTEP_SCALE, shift_time
from wanlora.foundation.errors import ConfigError
from wanlora.foundation.registry import Registry

UNIPC_START = float(np.float32(0.999))
"""The unshifted grid of UniPC starts at the last but one of 1000 levels, rounded to float32 as upstream."""


class Solver(Protocol):
    """One walk from t[0] to 0."""

    t: tuple[float, ...]
    """Noise levels, steps + 1 of them, the last 0."""
    timesteps: tuple[int, ...]
    """What the model is told at each step."""

    def step(self, velocity: Tensor, x: Tensor, index: int) -> Tensor:
        """The state at t[index + 1], float32, of the state `x` at t[index] and the velocity predicted there.

        To be called with index 0, 1, 2, ...; 0 starts a new walk. Any shape.
        """


SOLVERS: Registry[Callable[[int, float], Solver]] = Registry("sample_solver")


def _grid(steps: int, shift: float, start: float) -> tuple[float, ...]:
    """`steps` shifted levels from `start`, and 0."""
    if steps < 1:
        raise ConfigError(f"sampling needs at least 1 step, got {steps}")
    if not shift > 0:
        raise ConfigError(f"the flow shift must be greater than 0, got {shift}")
    return tuple(float(shift_time(t, shift)) for t in np.linspace(start, 0, steps + 1))


def _clock(grid: tuple[float, ...]) -> tuple[int, ...]:
    return tuple(int(TIMESTEP_SCALE * t) for t in grid[:-1])


def _rounded(grid: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(float(np.float32(t)) for t in grid)


def _half_log_snr(t: float) -> float:
    if t <= 0:
        return math.inf
    return -math.inf if t >= 1 else math.log(1 - t) - math.log(t)


@SOLVERS.register("unipc")
class UniPC:
    """UniPC of order 2 (B2(h), predicting the data). Zhao et al., 2302.04867, algorithms 5 to 8.

    Each prediction first corrects the state it was made at, then predicts the next one. The first and the last
    predictor are of order 1.
    """

    def __init__(self, steps: int, shift: float) -> None:
        grid = _grid(steps, shift, UNIPC_START)
        self.t = _rounded(grid)
        self.timesteps = _clock(grid)
        self._past: list[_Prediction] = []
        self._last_order = 1

    def step(self, velocity: Tensor, x: Tensor, index: int) -> Tensor:
        """See `Solver.step`."""
        if index == 0:
            self._past = []
        t = self.t[index]
        x = x.float()
        x0 = x - t * velocity.float()
        if index > 0:
            x = self._corrected(x0, t)
        self._past = [*self._past[-1:], _Prediction(t, x0, x)]
        self._last_order = min(2, len(self.timesteps) - index, index + 1)
        predicted = self._predicted(self.t[index + 1], self._last_order)
        if index == len(self.timesteps) - 1:
            self._past = []
        return predicted

    def _predicted(self, t: float, order: int) -> Tensor:
        """The state at t, extrapolated from the past."""
        here = self._past[-1]
        h = _half_log_snr(t) - _half_log_snr(here.t)
        growth = math.expm1(-h)
        x = t / here.t * here.x - (1 - t) * growth * here.x0
        if order == 2:
            x = x - (1 - t) * growth * 0.5 * self._slope(h)
        return x

    def _corrected(self, x0: Tensor, t: float) -> Tensor:
        """The state at t once more, now that the data predicted there is known."""
        here = self._past[-1]
        h = _half_log_snr(t) - _half_log_snr(here.t)
        growth = math.expm1(-h)
        change = x0 - here.x0
        if self._last_order == 1:
            correction = 0.5 * change
        else:
            past_share, share = self._corrector_shares(h)
            correction = past_share * self._slope(h) + share * change
        return t / here.t * here.x - (1 - t) * growth * (here.x0 + correction)

    def _slope(self, h: float) -> Tensor:
        """The change of the predicted data over the step before, scaled to a step of h."""
        before, here = self._past
        return (before.x0 - here.x0) / self._ratio(h)

    def _ratio(self, h: float) -> float:
        before, here = self._past
        return (_half_log_snr(before.t) - _half_log_snr(here.t)) / h

    def _corrector_shares(self, h: float) -> tuple[float, float]:
        """The solution a of [[1, 1], [r, 1]] a = b that makes the corrector exact to order 2."""
        growth = math.expm1(-h)
        phi_2 = growth / -h - 1
        phi_3 = phi_2 / -h - 0.5
        b1, b2 = phi_2 / growth, 2 * phi_3 / growth
        past_share = (b1 - b2) / (1 - self._ratio(h))
        return past_share, b1 - past_share


@SOLVERS.register("dpm++")
class DPMPlusPlus:
    """DPM-Solver++(2M), midpoint. Lu et al., 2211.01095, algorithm 2. The first and the last step are of order 1."""

    def __init__(self, steps: int, shift: float) -> None:
        grid = _grid(steps, shift, 1.0)
        self.t = _rounded(grid)
        self.timesteps = _clock(grid)
        self._before: _Prediction | None = None

    def step(self, velocity: Tensor, x: Tensor, index: int) -> Tensor:
        """See `Solver.step`."""
        t, next_t = self.t[index], self.t[index + 1]
        x = x.float()
        x0 = x - t * velocity.float()
        last = index == len(self.timesteps) - 1
        data = x0 if index == 0 or last else self._extrapolated(x0, t, next_t)
        self._before = None if last else _Prediction(t, x0, x)
        growth = math.expm1(_half_log_snr(t) - _half_log_snr(next_t))
        return next_t / t * x - (1 - next_t) * growth * data

    def _extrapolated(self, x0: Tensor, t: float, next_t: float) -> Tensor:
        """The data as it will be predicted half a step ahead."""
        before = self._before
        if before is None:
            raise ValueError("the steps of a solver are taken in order, starting with 0")
        h = _half_log_snr(next_t) - _half_log_snr(t)
        h_before = _half_log_snr(t) - _half_log_snr(before.t)
        return x0 + 0.5 * h / h_before * (x0 - before.x0)


@SOLVERS.register("euler", "vanilla")
class Euler:
    """x + (t' - t) v."""

    def __init__(self, steps: int, shift: float) -> None:
        grid = _grid(steps, shift, 1.0)
        self.t = _rounded(grid)
        self.timesteps = _clock(grid)

    def step(self, velocity: Tensor, x: Tensor, index: int) -> Tensor:
        """See `Solver.step`."""
        return x.float() + (self.t[index + 1] - self.t[index]) * velocity.float()


@dataclass(frozen=True, slots=True)
class _Prediction:
    """At noise level t: the data that was predicted, and the state it was predicted from."""

    t: float
    x0: Tensor
    x: Tensor
