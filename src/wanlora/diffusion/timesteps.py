"""Which noise levels a model is trained on.

A sampler names a law of the noise level t, possibly depending on the size of the latent; its fields are the flags that
shape it. `TimestepPlan` cuts the law to a range and draws from it. Everything is a pure function of uniform numbers u,
which the caller takes from the stream "timesteps", so that a resumed run draws what an unbroken one would have drawn.

The laws are those that musubi-tuner's users know by name; `corrections.py` lists where the numbers differ from theirs.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from wanlora.diffusion.laws import Law, LogitNormal, Mixture, Mode, Shifted, Squeezed, Truncated, Uniform
from wanlora.foundation.errors import ConfigError
from wanlora.foundation.registry import Registry
from wanlora.foundation.shapes import PATCH, LatentShape

SMALLEST_MASS = 1e-12
"""A range that holds less of a law than this cannot be resolved in float64; it is drawn from evenly."""


class TimestepSampler(Protocol):
    """A law of the noise level, by latent size."""

    def law(self, latent: LatentShape) -> Law:
        """The law for latents of this size."""


TIMESTEP_SAMPLERS: Registry[Callable[..., TimestepSampler]] = Registry("timestep_sampling")


@TIMESTEP_SAMPLERS.register("sigma")
@dataclass(frozen=True, kw_only=True, slots=True)
class Sigma:
    """A density chosen by `weighting_scheme`, then shifted.

    The densities keep the direction that users of the scheme know: with logit_normal a positive `logit_mean` means
    less noise.
    """

    weighting_scheme: str = "none"
    discrete_flow_shift: float = 1.0
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29

    def __post_init__(self) -> None:
        _positive(discrete_flow_shift=self.discrete_flow_shift, logit_std=self.logit_std)
        if self.weighting_scheme == "mode" and not -1 <= self.mode_scale <= 2 / (math.pi - 2):
            raise ConfigError(f"mode_scale must be from -1 to 1.75, where the density is one, got {self.mode_scale}")

    def law(self, latent: LatentShape) -> Law:
        if self.weighting_scheme == "logit_normal":
            return LogitNormal(math.log(self.discrete_flow_shift) - self.logit_mean, self.logit_std)
        density = Mode(self.mode_scale) if self.weighting_scheme == "mode" else Uniform()
        return Shifted(density, self.discrete_flow_shift)


@TIMESTEP_SAMPLERS.register("uniform")
@dataclass(frozen=True, kw_only=True, slots=True)
class Even:
    """Every noise level alike."""

    def law(self, latent: LatentShape) -> Law:
        return Uniform()


@TIMESTEP_SAMPLERS.register("sigmoid")
@dataclass(frozen=True, kw_only=True, slots=True)
class Sigmoid:
    """sigmoid(sigmoid_scale z)."""

    sigmoid_scale: float = 1.0

    def __post_init__(self) -> None:
        _positive(sigmoid_scale=self.sigmoid_scale)

    def law(self, latent: LatentShape) -> Law:
        return LogitNormal(0.0, self.sigmoid_scale)


@TIMESTEP_SAMPLERS.register("shift")
@dataclass(frozen=True, kw_only=True, slots=True)
class Shift:
    """sigmoid(sigmoid_scale z), shifted by `discrete_flow_shift`."""

    discrete_flow_shift: float = 1.0
    sigmoid_scale: float = 1.0

    def __post_init__(self) -> None:
        _positive(discrete_flow_shift=self.discrete_flow_shift, sigmoid_scale=self.sigmoid_scale)

    def law(self, latent: LatentShape) -> Law:
        return LogitNormal(math.log(self.discrete_flow_shift), self.sigmoid_scale)


@dataclass(frozen=True, kw_only=True, slots=True)
class _LineShift:
    """sigmoid(sigmoid_scale z), shifted by exp(mu): mu is linear in the size of one latent frame."""

    far: ClassVar[tuple[int, float]]
    """The line runs through (256, 0.5) and this (size, mu)."""
    sigmoid_scale: float = 1.0

    def __post_init__(self) -> None:
        _positive(sigmoid_scale=self.sigmoid_scale)

    def size(self, latent: LatentShape) -> int:
        """Tokens of one latent frame."""
        return (latent.height // PATCH) * (latent.width // PATCH)

    def law(self, latent: LatentShape) -> Law:
        far_size, far_mu = self.far
        return LogitNormal(0.5 + (self.size(latent) - 256) * (far_mu - 0.5) / (far_size - 256), self.sigmoid_scale)


@TIMESTEP_SAMPLERS.register("flux_shift")
class FluxShift(_LineShift):
    """Shifted by size as Flux is."""

    far = (4096, 1.15)


@TIMESTEP_SAMPLERS.register("flux2_shift")
class Flux2Shift(_LineShift):
    """As flux_shift, counting the cells of one latent frame in place of its tokens."""

    far = (4096, 1.15)

    def size(self, latent: LatentShape) -> int:
        """Cells of one latent frame."""
        return latent.height * latent.width


@TIMESTEP_SAMPLERS.register("qwen_shift")
class QwenShift(_LineShift):
    """Shifted by size as Qwen-Image is."""

    far = (8192, 0.9)


@TIMESTEP_SAMPLERS.register("krea2_shift")
class Krea2Shift(_LineShift):
    """Shifted by size as Krea 2 is."""

    far = (6400, 1.15)


@TIMESTEP_SAMPLERS.register("ideogram4_shift")
@dataclass(frozen=True, kw_only=True, slots=True)
class Ideogram4Shift:
    """sigmoid(m + 1.5 z), m half the logarithm of the picture's area over that of 512 x 512."""

    def law(self, latent: LatentShape) -> Law:
        return LogitNormal(0.5 * math.log(256 * latent.height * latent.width / 512**2), 1.5)


@TIMESTEP_SAMPLERS.register("logsnr")
@dataclass(frozen=True, kw_only=True, slots=True)
class LogSnr:
    """The log signal-to-noise ratio is normal with `logit_mean` and `logit_std`; t = sigmoid(-ratio / 2)."""

    logit_mean: float = 0.0
    logit_std: float = 1.0

    def __post_init__(self) -> None:
        _positive(logit_std=self.logit_std)

    def law(self, latent: LatentShape) -> Law:
        return LogitNormal(-self.logit_mean / 2, self.logit_std / 2)


@TIMESTEP_SAMPLERS.register("qinglong_flux")
@dataclass(frozen=True, kw_only=True, slots=True)
class QinglongFlux:
    """79 % flux_shift, 11 % logsnr, 10 % near the clean end (log signal-to-noise ratio around 5.36)."""

    sigmoid_scale: float = 1.0
    logit_mean: float = 0.0
    logit_std: float = 1.0

    def __post_init__(self) -> None:
        _positive(sigmoid_scale=self.sigmoid_scale, logit_std=self.logit_std)

    def law(self, latent: LatentShape) -> Law:
        flux = FluxShift(sigmoid_scale=self.sigmoid_scale).law(latent)
        ratio = LogSnr(logit_mean=self.logit_mean, logit_std=self.logit_std).law(latent)
        return Mixture(((0.79, flux), (0.11, ratio), (0.10, _NEARLY_CLEAN)))


@TIMESTEP_SAMPLERS.register("qinglong_qwen")
@dataclass(frozen=True, kw_only=True, slots=True)
class QinglongQwen:
    """95 % qwen_shift, 5 % near the clean end (log signal-to-noise ratio around 5.36)."""

    sigmoid_scale: float = 1.0

    def __post_init__(self) -> None:
        _positive(sigmoid_scale=self.sigmoid_scale)

    def law(self, latent: LatentShape) -> Law:
        return Mixture(((0.95, QwenShift(sigmoid_scale=self.sigmoid_scale).law(latent)), (0.05, _NEARLY_CLEAN)))


_NEARLY_CLEAN = LogitNormal(-5.36 / 2, 0.5)


@dataclass(frozen=True, kw_only=True, slots=True)
class TimestepPlan:
    """A sampler, cut to a range of noise levels.

    Without `preserve` the law is squeezed into the range; with it, the law keeps its shape and everything outside is
    left out. A range that the law practically never visits (`SMALLEST_MASS`) is drawn from evenly instead; `notice`
    says so. Whatever happens, every t lies in the range.
    """

    sampler: TimestepSampler
    min_t: float = 0.0
    max_t: float = 1.0
    preserve: bool = False
    num_buckets: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.min_t < self.max_t <= 1:
            raise ConfigError(
                f"min_timestep must be below max_timestep, both from 0 (clean) to 1000 (noise), "
                f"got {self.min_t * 1000:g} and {self.max_t * 1000:g}"
            )
        if self.num_buckets is not None and self.num_buckets < 1:
            raise ConfigError(f"num_timestep_buckets must be at least 1, got {self.num_buckets}")

    def law(self, latent: LatentShape) -> Law:
        """The law that is drawn from, in the range."""
        base = self.sampler.law(latent)
        if (self.min_t, self.max_t) == (0.0, 1.0):
            return base
        if not self.preserve:
            return Squeezed(base, self.min_t, self.max_t)
        if self._is_out_of_reach(latent):
            return Squeezed(Uniform(), self.min_t, self.max_t)
        return Truncated(base, self.min_t, self.max_t)

    def uniforms(self, num: int, generator: torch.Generator) -> Tensor:
        """The u of `num` positions (an epoch's), float64: spread over `num_buckets` strata, or independent."""
        if self.num_buckets is None:
            return torch.rand(num, generator=generator, dtype=torch.float64)
        return stratified(num, self.num_buckets, generator)

    def draw(
        self, num: int, latent: LatentShape, generator: torch.Generator | None = None, u_B: Tensor | None = None
    ) -> Tensor:
        """t_B, float32 on the CPU, for `num` latents of one size: of the given u, or of u drawn from `generator`."""
        if u_B is None:
            u_B = self.uniforms(num, _required(generator))
        t_B = self.law(latent).quantile(u_B.to(torch.float64))
        return t_B.clamp(self.min_t, self.max_t).to(torch.float32)

    def share(self, latent: LatentShape, low: float, high: float) -> float:
        """The share of draws in (low, high], exactly."""
        below, upto = self.law(latent).cdf(torch.tensor([low, high], dtype=torch.float64))
        return float(upto - below)

    def notice(self, latent: LatentShape) -> str | None:
        """What to tell the user when the range is out of the law's reach."""
        if not (self.preserve and self._is_out_of_reach(latent)):
            return None
        return (
            f"preserve_distribution_shape: the chosen timestep sampling practically never falls into "
            f"{self.min_t * 1000:g} to {self.max_t * 1000:g}, so timesteps are drawn evenly from that range; "
            f"leave preserve_distribution_shape out or choose another timestep_sampling"
        )

    def _is_out_of_reach(self, latent: LatentShape) -> bool:
        return Truncated(self.sampler.law(latent), self.min_t, self.max_t).mass < SMALLEST_MASS


def sampler_options(name: str) -> tuple[str, ...]:
    """The settings that the sampler called `name` heeds. Raises `ConfigError` for an unknown name."""
    return tuple(inspect.signature(TIMESTEP_SAMPLERS.get(name)).parameters)


def build_plan(
    timestep_sampling: str,
    *,
    min_timestep: float | None = None,
    max_timestep: float | None = None,
    preserve_distribution_shape: bool = False,
    num_timestep_buckets: int | None = None,
    **options: float | str,
) -> TimestepPlan:
    """The plan of a run, from its settings (timesteps from 0 to 1000).

    Of `options` (discrete_flow_shift, sigmoid_scale, weighting_scheme, logit_mean, logit_std, mode_scale) the sampler
    takes those it heeds; `corrections.notices` names the rest. Raises `ConfigError` for values without meaning.
    """
    heeded = {name: options[name] for name in sampler_options(timestep_sampling) if name in options}
    return TimestepPlan(
        sampler=TIMESTEP_SAMPLERS.get(timestep_sampling)(**heeded),
        min_t=0.0 if min_timestep is None else min_timestep / 1000,
        max_t=1.0 if max_timestep is None else max_timestep / 1000,
        preserve=preserve_distribution_shape,
        num_buckets=num_timestep_buckets,
    )


def stratified(num: int, num_buckets: int, generator: torch.Generator) -> Tensor:
    """`num` uniform numbers, float64, as many in each of `num_buckets` equal strata as in any other (give or take one
    where `num` is no multiple), in random order.

    With one generator per epoch this is a pure function of seed and epoch.
    """
    rounds = -(-num // num_buckets)
    strata = torch.cat([torch.randperm(num_buckets, generator=generator) for _ in range(rounds)])[:num]
    u = (strata + torch.rand(num, generator=generator, dtype=torch.float64)) / num_buckets
    return u[torch.randperm(num, generator=generator)]


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ConfigError(f"{name} must be greater than 0, got {value}")


def _required(generator: torch.Generator | None) -> torch.Generator:
    if generator is None:
        raise ValueError("a generator is needed where u is not given")
    return generator
