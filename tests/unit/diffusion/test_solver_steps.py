"""Grids and steps of the solvers."""

import gc
import weakref

import pytest
import torch

from wanlora.diffusion.solvers import SOLVERS
from wanlora.foundation.errors import ConfigError

NAMES = ("unipc", "dpm++", "euler")


@pytest.mark.parametrize(
    ("shift", "first", "last"),
    [
        (5.0, [999, 994, 989, 983, 978, 972], [356, 288, 208, 113]),
        (12.0, [999, 997, 995, 993, 990, 988], [571, 492, 386, 235]),
        (3.0, [999, 991, 982, 973, 963, 954], [249, 195, 136, 71]),
    ],
)
def test_unipc_tells_the_model_the_official_values(shift: float, first: list[int], last: list[int]) -> None:
    timesteps = SOLVERS.get("unipc")(40, shift).timesteps
    assert list(timesteps[:6]) == first
    assert list(timesteps[-4:]) == last


@pytest.mark.parametrize(("shift", "boundary", "high"), [(12.0, 875, 26), (5.0, 900, 15)])
def test_the_grid_splits_between_two_experts_as_upstream(shift: float, boundary: int, high: int) -> None:
    timesteps = SOLVERS.get("unipc")(40, shift).timesteps
    assert sum(timestep >= boundary for timestep in timesteps) == high


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_straight_path_is_walked_exactly(name: str, steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x0, x1 = torch.randn(2, 3, 4, generator=generator), torch.randn(2, 3, 4, generator=generator)
    solver = SOLVERS.get(name)(steps, 3.0)
    start = solver.t[0]
    x = (1 - start) * x0 + start * x1
    for index in range(steps):
        x = solver.step(x1 - x0, x, index)
    torch.testing.assert_close(x, x0, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_states_are_float32_whatever_the_model_computes_in(name: str) -> None:
    solver = SOLVERS.get(name)(3, 1.0)
    x = torch.randn(4)
    for index in range(3):
        x = solver.step(x.bfloat16(), x, index)
        assert x.dtype == torch.float32


@pytest.mark.parametrize("name", NAMES)
def test_duplicate_clock_values_do_not_confuse_the_walk(name: str) -> None:
    solver = SOLVERS.get(name)(200, 16.0)
    assert len(set(solver.timesteps)) < 200
    x = torch.ones(3)
    for index, t in enumerate(solver.t[:-1]):
        x = solver.step(x - t, x, index)
    assert x.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_remembered_after_the_last_step(name: str) -> None:
    solver = SOLVERS.get(name)(3, 3.0)
    x = torch.randn(5)
    states = [weakref.ref(x)]
    for index in range(3):
        x = solver.step(torch.ones(5), x, index)
        states.append(weakref.ref(x))
    del x
    gc.collect()
    assert [state() for state in states] == [None] * 4


@pytest.mark.parametrize("name", NAMES)
def test_a_second_walk_repeats_the_first(name: str) -> None:
    solver = SOLVERS.get(name)(4, 3.0)
    ends = []
    for _ in range(2):
        x = torch.linspace(-1, 1, 7)
        for index in range(4):
            x = solver.step(x.sin(), x, index)
        ends.append(x)
    assert torch.equal(ends[0], ends[1])


def test_vanilla_is_euler() -> None:
    assert SOLVERS.get("vanilla") is SOLVERS.get("euler")


@pytest.mark.parametrize("name", NAMES)
def test_senseless_settings_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="at least 1 step"):
        SOLVERS.get(name)(0, 3.0)
    with pytest.raises(ConfigError, match="flow shift"):
        SOLVERS.get(name)(3, 0.0)
