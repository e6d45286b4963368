"""The path between data and noise, and the weights of the loss along it."""

import pytest
import torch

from wanlora.diffusion.flow import interpolate, model_timestep, shift_time, velocity, x0_from_velocity
from wanlora.diffusion.weighting import LOSS_WEIGHTINGS
from wanlora.foundation.errors import ConfigError


def _pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 4, 2, 3, 5, generator=generator), torch.randn(3, 4, 2, 3, 5, generator=generator)


def test_the_path_starts_at_data_and_ends_at_noise() -> None:
    x0, x1 = _pair()
    xt = interpolate(x0, x1, torch.tensor([0.0, 1.0, 0.25]))
    assert torch.equal(xt[0], x0[0])
    assert torch.equal(xt[1], x1[1])
    torch.testing.assert_close(xt[2], 0.75 * x0[2] + 0.25 * x1[2])


def test_the_path_of_half_precision_latents_is_float32() -> None:
    x0, x1 = _pair()
    assert interpolate(x0.bfloat16(), x1.float(), torch.rand(3)).dtype == torch.float32


def test_velocity_is_the_derivative_of_the_path() -> None:
    x0, x1 = (x.double() for x in _pair())
    t, dt = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), 1e-3
    change = (interpolate(x0, x1, t + dt) - interpolate(x0, x1, t)) / dt
    torch.testing.assert_close(velocity(x0, x1), change)


def test_the_true_velocity_points_back_to_the_data() -> None:
    x0, x1 = _pair()
    t = torch.tensor([0.1, 0.5, 1.0])
    torch.testing.assert_close(x0_from_velocity(interpolate(x0, x1, t), velocity(x0, x1), t), x0)


def test_the_model_is_told_a_thousand_t_without_rounding() -> None:
    assert model_timestep(torch.tensor([0.0, 0.87654, 1.0])).tolist() == pytest.approx([0, 876.54, 1000])


def test_shifting_time_keeps_the_ends_and_can_be_undone() -> None:
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    shifted = shift_time(t, 5.0)
    assert shifted[0] == 0
    assert shifted[-1] == 1
    assert (shifted[1:-1] > t[1:-1]).all()
    torch.testing.assert_close(shift_time(shifted, 1 / 5.0), t)


def test_weights_follow_their_formulas_at_the_exact_t() -> None:
    t = torch.tensor([0.1, 0.12345, 0.5, 1.0])
    assert LOSS_WEIGHTINGS.get("sigma_sqrt")(t).tolist() == pytest.approx([100, 0.12345**-2, 4, 1])
    assert LOSS_WEIGHTINGS.get("cosmap")(t).tolist() == pytest.approx(
        [0.776356, 0.812450, 1.273240, 0.636620], rel=1e-4
    )
    for name in ("none", "logit_normal", "mode"):
        assert LOSS_WEIGHTINGS.get(name)(t).tolist() == [1, 1, 1, 1]


def test_a_noise_level_of_zero_has_a_finite_weight() -> None:
    assert LOSS_WEIGHTINGS.get("sigma_sqrt")(torch.tensor([0.0])).item() == pytest.approx(1e6)


def test_an_unknown_weighting_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'cosmap'"):
        LOSS_WEIGHTINGS.get("cosmapp")
