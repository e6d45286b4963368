"""Laws of the noise level, ranges, strata."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from wanlora.diffusion.corrections import CORRECTIONS, notices
from wanlora.diffusion.timesteps import TIMESTEP_SAMPLERS, build_plan, sampler_options, stratified
from wanlora.foundation.errors import ConfigError
from wanlora.foundation.random import Streams
from wanlora.foundation.shapes import LatentShape

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "musubi-golden.json").read_text("utf-8"))[
    "timesteps_from_u"
]
LATENT = LatentShape(frames=1, height=GOLDEN["latent_hw"][0], width=GOLDEN["latent_hw"][1])
EVERY_LAW: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in TIMESTEP_SAMPLERS.names),
    ("sigma", {"weighting_scheme": "logit_normal", "logit_mean": 0.4, "discrete_flow_shift": 3.0}),
    ("sigma", {"weighting_scheme": "mode", "discrete_flow_shift": 3.0}),
    ("shift", {"discrete_flow_shift": 5.0, "sigmoid_scale": 1.5}),
]


def _generator(*position: int) -> torch.Generator:
    return Streams(7).generator("timesteps", *position)


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: " ".join(case["args"][1:]))
def test_noise_levels_are_those_of_musubi_for_the_same_u(case: dict[str, Any]) -> None:
    flags = dict(zip(case["args"][::2], case["args"][1::2], strict=True))
    settings = {name.removeprefix("--"): value for name, value in flags.items()}
    sampling = settings.pop("timestep_sampling")
    plan = build_plan(sampling, **{name: float(value) for name, value in settings.items()})  # type: ignore[arg-type]
    t = plan.draw(len(GOLDEN["u"]), LATENT, u_B=torch.tensor(GOLDEN["u"]))
    assert t.dtype == torch.float32
    assert t.tolist() == pytest.approx(case["sigma"], abs=1.5e-6)


@pytest.mark.parametrize(("name", "options"), EVERY_LAW)
def test_quantile_and_distribution_function_are_inverses(name: str, options: dict[str, Any]) -> None:
    law = build_plan(name, **options).law(LATENT)
    u = torch.linspace(0.001, 0.999, 101, dtype=torch.float64)
    t = law.quantile(u)
    assert (t.diff() > 0).all()
    assert t.min() >= 0
    assert t.max() <= 1
    torch.testing.assert_close(law.cdf(t), u, atol=1e-9, rtol=0)


@pytest.mark.parametrize("preserve", [False, True])
@pytest.mark.parametrize(("name", "options"), EVERY_LAW)
@pytest.mark.parametrize(("low", "high"), [(875, 1000), (0, 10), (300, 301)])
def test_every_draw_lies_in_the_range(name: str, options: dict[str, Any], preserve: bool, low: int, high: int) -> None:
    plan = build_plan(name, min_timestep=low, max_timestep=high, preserve_distribution_shape=preserve, **options)
    t = plan.draw(200, LATENT, _generator())
    assert torch.tensor(low / 1000) <= t.min()
    assert t.max() <= torch.tensor(high / 1000)
    assert t.unique().numel() > 100


def test_preserving_the_shape_equals_rejecting_what_lies_outside() -> None:
    num = 200_000
    options: dict[str, Any] = {"discrete_flow_shift": 3.0}
    free = build_plan("shift", **options).draw(num, LATENT, _generator(1))
    kept = free[(free >= 0.5) & (free <= 0.8)]
    plan = build_plan("shift", min_timestep=500, max_timestep=800, preserve_distribution_shape=True, **options)
    drawn = plan.draw(num, LATENT, _generator(2))
    levels = torch.linspace(0.05, 0.95, 19)
    torch.testing.assert_close(drawn.quantile(levels), kept.quantile(levels), atol=3e-3, rtol=0)


def test_without_preserving_the_shape_moves_into_the_range() -> None:
    u = torch.tensor([0.1, 0.5, 0.9])
    free = build_plan("sigmoid").draw(3, LATENT, u_B=u)
    squeezed = build_plan("sigmoid", min_timestep=200, max_timestep=600).draw(3, LATENT, u_B=u)
    torch.testing.assert_close(squeezed, 0.2 + 0.4 * free)


def test_a_range_out_of_reach_is_drawn_evenly_and_announced() -> None:
    plan = build_plan(
        "shift",
        discrete_flow_shift=12.0,
        sigmoid_scale=0.5,
        min_timestep=0,
        max_timestep=10,
        preserve_distribution_shape=True,
    )
    notice = plan.notice(LATENT)
    assert notice is not None
    assert "drawn evenly from that range" in notice
    assert plan.draw(3, LATENT, u_B=torch.tensor([0.1, 0.5, 0.9])).tolist() == pytest.approx([0.001, 0.005, 0.009])
    assert build_plan("shift", max_timestep=500, preserve_distribution_shape=True).notice(LATENT) is None


def test_sigma_heeds_the_shift_and_large_timesteps_are_noise() -> None:
    u = torch.tensor([0.25, 0.5, 0.75])
    assert build_plan("sigma", discrete_flow_shift=3.0).draw(3, LATENT, u_B=u).tolist() == pytest.approx(
        [0.5, 0.75, 0.9]
    )
    assert build_plan("sigma", min_timestep=875).draw(3, LATENT, u_B=u).min() >= 0.875


def test_a_positive_logit_mean_means_less_noise_in_sigma() -> None:
    plan = build_plan("sigma", weighting_scheme="logit_normal", logit_mean=1.0)
    assert plan.draw(1, LATENT, u_B=torch.tensor([0.5])).item() == pytest.approx(
        1 - torch.sigmoid(torch.tensor(1.0)).item()
    )


def test_the_mode_density_is_that_of_its_paper() -> None:
    u, scale = 0.2, 1.29
    expected = 1 - u - scale * (torch.cos(torch.tensor(torch.pi * u / 2)).item() ** 2 - 1 + u)
    plan = build_plan("sigma", weighting_scheme="mode", mode_scale=scale)
    assert plan.draw(1, LATENT, u_B=torch.tensor([1 - u])).item() == pytest.approx(expected, abs=1e-6)


def test_a_mixture_has_the_shares_of_its_parts() -> None:
    t = build_plan("qinglong_qwen").draw(100_000, LATENT, _generator())
    qwen, clean = (
        build_plan("qwen_shift").share(LATENT, 0, 0.1),
        build_plan("logsnr", logit_mean=5.36).share(LATENT, 0, 0.1),
    )
    assert (t <= 0.1).float().mean().item() == pytest.approx(0.95 * qwen + 0.05 * clean, abs=4e-3)


def test_shares_of_bands_are_exact() -> None:
    plan = build_plan("shift", discrete_flow_shift=5.0)
    t = plan.draw(100_000, LATENT, _generator())
    assert plan.share(LATENT, 0.875, 1) == pytest.approx((t > 0.875).float().mean().item(), abs=5e-3)
    assert plan.share(LATENT, 0, 1) == pytest.approx(1)


def test_shift_by_size_grows_with_the_frame_and_not_with_their_number() -> None:
    plan = build_plan("flux_shift")
    u = torch.tensor([0.5])
    small, large = LatentShape(1, 32, 32), LatentShape(1, 128, 128)
    assert plan.draw(1, small, u_B=u).item() == pytest.approx(torch.sigmoid(torch.tensor(0.5)).item())
    assert plan.draw(1, large, u_B=u).item() == pytest.approx(torch.sigmoid(torch.tensor(1.15)).item())
    assert torch.equal(plan.draw(1, LatentShape(21, 32, 32), u_B=u), plan.draw(1, small, u_B=u))


@pytest.mark.parametrize("num", [12, 13, 3])
def test_strata_hold_equally_many(num: int) -> None:
    u = stratified(num, 4, _generator(0))
    counts = torch.bincount((u * 4).long(), minlength=4)
    assert u.shape == (num,)
    assert counts.max() - counts.min() <= 1


def test_an_epochs_draws_depend_on_seed_and_epoch_alone() -> None:
    plan = build_plan("shift", num_timestep_buckets=5)
    assert torch.equal(plan.uniforms(17, _generator(3)), plan.uniforms(17, _generator(3)))
    assert not torch.equal(plan.uniforms(17, _generator(3)), plan.uniforms(17, _generator(4)))


def test_strata_are_shuffled() -> None:
    u = stratified(1000, 2, _generator(0))
    halves = (u * 2).long()
    assert 300 < (halves[1:] == halves[:-1]).sum() < 700


def test_strata_reach_the_truncated_law() -> None:
    plan = build_plan(
        "shift", min_timestep=875, preserve_distribution_shape=True, num_timestep_buckets=10, discrete_flow_shift=5.0
    )
    t = plan.draw(10, LATENT, _generator(0))
    shares = [plan.share(LATENT, 0.875, float(level)) for level in t.sort().values]
    assert [int(share * 10) for share in shares] == list(range(10))


def test_drawing_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    build_plan("qinglong_flux", num_timestep_buckets=4).draw(9, LATENT, _generator())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"timestep_sampling": "shfit"}, "did you mean 'shift'"),
        ({"timestep_sampling": "shift", "min_timestep": 900, "max_timestep": 100}, "min_timestep must be below"),
        ({"timestep_sampling": "shift", "max_timestep": 1001}, "from 0 .clean. to 1000"),
        ({"timestep_sampling": "shift", "discrete_flow_shift": 0.0}, "discrete_flow_shift must be greater than 0"),
        ({"timestep_sampling": "flux_shift", "sigmoid_scale": -1.0}, "sigmoid_scale must be greater than 0"),
        ({"timestep_sampling": "sigma", "weighting_scheme": "mode", "mode_scale": 3.0}, "mode_scale must be from -1"),
        ({"timestep_sampling": "shift", "num_timestep_buckets": 0}, "num_timestep_buckets must be at least 1"),
    ],
)
def test_values_without_meaning_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_plan(**settings)


def test_a_sampler_heeds_its_fields() -> None:
    assert sampler_options("shift") == ("discrete_flow_shift", "sigmoid_scale")
    assert sampler_options("flux_shift") == ("sigmoid_scale",)
    assert sampler_options("uniform") == ()


def test_notices_name_what_differs_and_what_has_no_effect() -> None:
    said = notices("sigma", discrete_flow_shift=3.0, min_timestep=875, num_timestep_buckets=4)
    assert said == tuple(CORRECTIONS[name] for name in ("timestep", "sigma_shift", "sigma_range", "buckets"))
    said = notices("uniform", discrete_flow_shift=3.0, weighting_scheme="logit_normal", sigmoid_scale=1.0)
    assert said[0] == CORRECTIONS["timestep"]
    assert [sentence.split(" has no effect")[0] for sentence in said[1:]] == [
        "discrete_flow_shift 3.0",
        "weighting_scheme logit_normal",
    ]
    assert notices("shift", discrete_flow_shift=3.0) == (CORRECTIONS["timestep"],)
    assert CORRECTIONS["weights"] in notices("shift", weighting_scheme="cosmap")
