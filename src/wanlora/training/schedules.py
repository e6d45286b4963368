"""Learning rates as pure functions of the step.

A schedule is `factor(step) -> float`; the learning rate of optimizer step `step` (counted from 0) is the factor times
the base rate. Nothing is kept between steps, so a resumed run needs only its step. Names and defaults are those of
transformers' `SchedulerType` and of musubi; Rex follows https://arxiv.org/abs/2107.04197. A class given by its dotted
path is the exception: it keeps its own state, which is saved.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from wanlora.config.train import ScheduleConfig
from wanlora.foundation.errors import ConfigError, did_you_mean
from wanlora.foundation.log import say_once
from wanlora.foundation.registry import Registry

Factor = Callable[[int], float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """What every schedule is made from; steps are optimizer steps."""

    total: int
    warmup: int = 0
    decay: int = 0
    num_cycles: int = 1
    power: float = 1.0
    timescale: int | None = None
    min_ratio: float | None = None
    base_rate: float = 1.0

    def warmed(self, after: Factor, *, low: float = 0.0) -> Factor:
        """Rise linearly from `low` during the warm-up, then follow `after`."""

        def factor(step: int) -> float:
            return low + (1.0 - low) * step / self.warmup if step < self.warmup else after(step)

        return factor

    def progress(self, step: int) -> float:
        """0 at the end of the warm-up, 1 at the last step."""
        return min(1.0, (step - self.warmup) / max(1, self.total - self.warmup))


SCHEDULES: Registry[Callable[[Span], Factor]] = Registry("lr_scheduler")


def half_cosine(progress: float) -> float:
    """1 at 0, 0 at 1."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


@SCHEDULES.register("constant")
def constant(span: Span) -> Factor:
    """The base rate throughout."""
    return lambda step: 1.0


@SCHEDULES.register("constant_with_warmup")
def constant_with_warmup(span: Span) -> Factor:
    """The base rate after the warm-up."""
    return span.warmed(lambda step: 1.0)


@SCHEDULES.register("linear")
def linear(span: Span) -> Factor:
    """Straight down to 0."""
    return span.warmed(lambda step: 1.0 - span.progress(step))


@SCHEDULES.register("cosine")
def cosine(span: Span) -> Factor:
    """Half a cosine down to 0."""
    return span.warmed(lambda step: half_cosine(span.progress(step)))


@SCHEDULES.register("cosine_with_restarts")
def cosine_with_restarts(span: Span) -> Factor:
    """`num_cycles` half cosines, each from the base rate to 0."""

    def factor(step: int) -> float:
        progress = span.progress(step)
        return 0.0 if progress >= 1.0 else half_cosine(span.num_cycles * progress % 1.0)

    return span.warmed(factor)


@SCHEDULES.register("cosine_with_min_lr")
def cosine_with_min_lr(span: Span) -> Factor:
    """Cosine down to `min_ratio` of the base rate."""
    low = span.min_ratio or 0.0
    return span.warmed(lambda step: low + (1.0 - low) * half_cosine(span.num_cycles * span.progress(step)))


@SCHEDULES.register("cosine_warmup_with_min_lr")
def cosine_warmup_with_min_lr(span: Span) -> Factor:
    """`cosine_with_min_lr` one step ahead: the first step is not idle, the last one is at the lowest rate."""
    ahead = cosine_with_min_lr(span)
    return lambda step: ahead(step + 1)


@SCHEDULES.register("polynomial")
def polynomial(span: Span) -> Factor:
    """Down to 1e-7 as a power of what is left."""
    end = min(1.0, 1e-7 / span.base_rate) if span.base_rate > 0 else 0.0
    return span.warmed(lambda step: end + (1.0 - end) * (1.0 - span.progress(step)) ** span.power)


@SCHEDULES.register("inverse_sqrt")
def inverse_sqrt(span: Span) -> Factor:
    """One over the square root of the step, in units of `timescale`."""
    timescale = span.timescale or span.warmup or 10_000
    shift = timescale - span.warmup
    return span.warmed(lambda step: 1.0 / math.sqrt((step + shift) / timescale))


@SCHEDULES.register("warmup_stable_decay")
def warmup_stable_decay(span: Span) -> Factor:
    """Hold the base rate, then a cosine over the last `decay` steps down to `min_ratio`."""
    low, start = span.min_ratio or 0.0, span.total - span.decay

    def factor(step: int) -> float:
        if step < start:
            return 1.0
        return low + (1.0 - low) * half_cosine(min(1.0, (step - start) / max(1, span.decay)) * span.num_cycles)

    return span.warmed(factor, low=low)


@SCHEDULES.register("rex")
def rex(span: Span, *, alpha: float = 0.1, beta: float = 0.9) -> Factor:
    """Stays high, then falls quickly: z / (alpha + beta z) of what is left, z, down to `min_ratio`."""
    low = 0.01 if span.min_ratio is None else span.min_ratio

    def factor(step: int) -> float:
        left = 1.0 - span.progress(step)
        return low + (1.0 - low) * left / (alpha + beta * left)

    return span.warmed(factor)


_MEASURED = "it follows a measured loss and not the step, so a run could not be planned or resumed exactly"
NOT_SCHEDULES: dict[str, str] = {"reduce_lr_on_plateau": _MEASURED, "greedy": _MEASURED}
"""Names that users may know and that are no function of the step: the reason."""


def piecewise_constant(rules: str) -> Factor:
    """`"1:10,0.1:20,0.01"`: factor 1 before step 10, 0.1 before step 20, 0.01 from then on."""
    try:
        *pairs, last = rules.split(",")
        steps = sorted((int(step), float(value)) for value, step in (pair.split(":") for pair in pairs))
        final = float(last)
    except ValueError:
        raise ConfigError(f"step_rules={rules!r} should look like 1:1000,0.1:2000,0.01") from None
    return lambda step: next((value for limit, value in steps if step < limit), final)


def build_schedule(config: ScheduleConfig, *, total: int, base_rate: float, constant_rate: bool = False) -> Factor:
    """The factor that the flags ask for; `constant_rate` is for optimizers that schedule themselves."""
    if constant_rate:
        if config.lr_scheduler != "constant":
            say_once(f"--lr_scheduler {config.lr_scheduler} has no effect: this optimizer schedules itself")
        return constant(Span(total=total))
    arguments = config.kwargs
    if config.lr_scheduler == "piecewise_constant":
        if "step_rules" not in arguments:
            raise ConfigError(
                "--lr_scheduler piecewise_constant needs --lr_scheduler_args step_rules=1:1000,0.1:2000,0.01"
            )
        return piecewise_constant(str(arguments["step_rules"]).strip("\"'"))
    span = Span(
        total=total,
        warmup=in_steps(config.lr_warmup_steps, total),
        decay=in_steps(config.lr_decay_steps, total),
        num_cycles=config.lr_scheduler_num_cycles,
        power=config.lr_scheduler_power,
        timescale=config.lr_scheduler_timescale,
        min_ratio=config.lr_scheduler_min_lr_ratio,
        base_rate=base_rate,
    )
    if config.lr_scheduler == "rex":
        return rex(span, **_rex_arguments(arguments))
    if arguments:
        raise ConfigError(f"--lr_scheduler_args {' '.join(arguments)}: {config.lr_scheduler} takes none; remove them")
    return SCHEDULES.get(config.lr_scheduler)(span)


def _rex_arguments(arguments: Mapping[str, Any]) -> dict[str, float]:
    known = ("rex_alpha", "rex_beta")
    for key, value in arguments.items():
        if key not in known:
            raise ConfigError(f"--lr_scheduler_args {key}: rex takes rex_alpha and rex_beta{did_you_mean(key, known)}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise ConfigError(f"--lr_scheduler_args {key} must be a number above 0, got {value!r}")
    return {key.removeprefix("rex_"): float(value) for key, value in arguments.items()}


def in_steps(amount: int | float, total: int) -> int:
    """An int is a number of steps, a float a share of the run."""
    return amount if isinstance(amount, int) else int(amount * total)
