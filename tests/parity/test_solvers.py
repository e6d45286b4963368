"""Solvers against those of diffusers, which are independently written."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from wanlora.diffusion.solvers import SOLVERS, UNIPC_START

STEPS = (1, 2, 3, 8, 20, 40)
SHIFTS = (1.0, 3.0, 5.0, 12.0)


def _field(x: torch.Tensor, t: float) -> torch.Tensor:
    """A velocity that depends on state and time as a network's would, without settling anywhere."""
    return torch.tanh(1.7 * x + 0.3) - 0.6 * x + np.cos(3 * t)


def _ours(name: str, steps: int, shift: float, x: torch.Tensor) -> torch.Tensor:
    solver = SOLVERS.get(name)(steps, shift)
    for index, t in enumerate(solver.t[:-1]):
        x = solver.step(_field(x, t), x, index)
    return x


def _theirs(scheduler: Any, x: torch.Tensor) -> torch.Tensor:
    scheduler.set_begin_index(0)
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas[:-1], strict=True):
        x = scheduler.step(_field(x, float(sigma)), timestep, x, return_dict=False)[0]
    return x


def _unipc(steps: int, shift: float) -> Any:
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(UNIPC_START, 0, steps + 1)[:-1])
    return scheduler


def _dpm(steps: int, shift: float) -> Any:
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, algorithm_type="dpmsolver++", solver_type="midpoint"
    )
    scheduler.set_timesteps(steps)
    sigmas = np.linspace(1, 0, steps + 1)
    sigmas = (shift * sigmas / (1 + (shift - 1) * sigmas)).astype(np.float32)
    scheduler.sigmas = torch.from_numpy(sigmas)
    scheduler.timesteps = (scheduler.sigmas[:-1] * 1000).to(torch.int64)
    return scheduler


def _euler(steps: int, shift: float) -> Any:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 0, steps + 1)[:-1])
    return scheduler


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(("name", "oracle"), [("unipc", _unipc), ("dpm++", _dpm), ("euler", _euler)])
def test_a_walk_ends_where_diffusers_ends(
    name: str, oracle: Callable[[int, float], Any], steps: int, shift: float
) -> None:
    x = torch.randn(2, 4, 3, 4, 5, generator=torch.Generator().manual_seed(steps))
    torch.testing.assert_close(_ours(name, steps, shift, x), _theirs(oracle(steps, shift), x), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("steps", STEPS)
def test_unipc_tells_the_model_what_diffusers_tells_it(steps: int, shift: float) -> None:
    assert list(SOLVERS.get("unipc")(steps, shift).timesteps) == _unipc(steps, shift).timesteps.tolist()


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("steps", STEPS)
def test_euler_walks_the_grid_of_diffusers(steps: int, shift: float) -> None:
    expected = _euler(steps, shift).sigmas
    torch.testing.assert_close(torch.tensor(SOLVERS.get("euler")(steps, shift).t), expected, atol=1e-6, rtol=0)
