"""Where noise levels and weights differ from musubi-tuner's for the same flags, and what to tell users about it.

`CORRECTIONS` is the list for the documentation; `notices` picks the sentences that concern one run's settings and adds
one for each setting that has no effect there.
"""

from collections.abc import Mapping

from wanlora.diffusion.timesteps import sampler_options

CORRECTIONS: dict[str, str] = {
    "timestep": "the model is told 1000 t, as the official code does (musubi-tuner tells it 1000 t + 1)",
    "sigma_shift": "timestep_sampling sigma: discrete_flow_shift takes effect (musubi-tuner ignores it in this mode)",
    "sigma_range": (
        "timestep_sampling sigma: min_timestep and max_timestep count noise, 1000 is pure noise "
        "(musubi-tuner inverts them in this mode, so the same flags trained the other end there)"
    ),
    "preserve": (
        "preserve_distribution_shape: every timestep lies in the range (musubi-tuner falls back to timesteps outside)"
    ),
    "buckets": (
        "num_timestep_buckets also holds with timestep_sampling sigma and with preserve_distribution_shape "
        "(musubi-tuner draws these independently)"
    ),
    "weights": (
        "weighting_scheme weighs each sample by its exact timestep (musubi-tuner takes the nearest of 1000 levels)"
    ),
}

_DEFAULTS: dict[str, float | str] = {
    "discrete_flow_shift": 1.0,
    "sigmoid_scale": 1.0,
    "logit_mean": 0.0,
    "logit_std": 1.0,
    "mode_scale": 1.29,
}


def notices(
    timestep_sampling: str,
    *,
    weighting_scheme: str = "none",
    min_timestep: float | None = None,
    max_timestep: float | None = None,
    preserve_distribution_shape: bool = False,
    num_timestep_buckets: int | None = None,
    **options: float | str,
) -> tuple[str, ...]:
    """The sentences to say once at the start of a run with these settings (the arguments of `build_plan`)."""
    sigma = timestep_sampling == "sigma"
    ranged = min_timestep not in (None, 0) or max_timestep not in (None, 1000)
    applies = {
        "timestep": True,
        "sigma_shift": sigma and options.get("discrete_flow_shift", 1.0) != 1.0,
        "sigma_range": sigma and ranged,
        "preserve": preserve_distribution_shape and ranged,
        "buckets": num_timestep_buckets is not None and (sigma or preserve_distribution_shape),
        "weights": not sigma and weighting_scheme in ("sigma_sqrt", "cosmap"),
    }
    corrected = tuple(CORRECTIONS[name] for name, holds in applies.items() if holds)
    return corrected + _without_effect(timestep_sampling, weighting_scheme, options)


def _without_effect(
    timestep_sampling: str, weighting_scheme: str, options: Mapping[str, float | str]
) -> tuple[str, ...]:
    heeded = sampler_options(timestep_sampling)
    unused = [
        f"{name} {options[name]} has no effect with timestep_sampling {timestep_sampling}"
        for name, default in _DEFAULTS.items()
        if name not in heeded and options.get(name, default) != default
    ]
    if weighting_scheme in ("logit_normal", "mode") and "weighting_scheme" not in heeded:
        unused.append(
            f"weighting_scheme {weighting_scheme} has no effect with timestep_sampling {timestep_sampling}; "
            f"it shapes the draws of timestep_sampling sigma"
        )
    return tuple(unused)
