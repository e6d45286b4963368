"""Learning rates against transformers' schedulers, the recorded Rex values and hand-made rules."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import optimization

from wanlora.config.train import ScheduleConfig
from wanlora.foundation.errors import ConfigError
from wanlora.training.schedules import build_schedule, in_steps

STEPS = 50
BASE = 2e-3
GOLDEN = Path(__file__).parents[2] / "golden" / "musubi-golden.json"


def reference(make: Callable[[Optimizer], LRScheduler]) -> list[float]:
    """The learning rates of 50 steps with a scheduler that is stepped after each of them."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=BASE)
    scheduler = make(optimizer)
    rates = []
    for _ in range(STEPS):
        rates.append(float(scheduler.get_last_lr()[0]))
        optimizer.step()
        scheduler.step()
    return rates


def ours(total: int = STEPS, **settings: Any) -> list[float]:
    factor = build_schedule(ScheduleConfig(**settings), total=total, base_rate=BASE)
    return [BASE * factor(step) for step in range(STEPS)]


def made_by(name: str, *arguments: Any, **options: Any) -> Callable[[Optimizer], LRScheduler]:
    return lambda optimizer: getattr(optimization, name)(optimizer, *arguments, **options)


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize(
    ("settings", "make"),
    [
        ({"lr_scheduler": "linear"}, lambda w: made_by("get_linear_schedule_with_warmup", w, STEPS)),
        ({"lr_scheduler": "cosine"}, lambda w: made_by("get_cosine_schedule_with_warmup", w, STEPS)),
        (
            {"lr_scheduler": "cosine_with_restarts", "lr_scheduler_num_cycles": 3},
            lambda w: made_by("get_cosine_with_hard_restarts_schedule_with_warmup", w, STEPS, num_cycles=3),
        ),
        (
            {"lr_scheduler": "cosine_with_min_lr", "lr_scheduler_min_lr_ratio": 0.2},
            lambda w: made_by("get_cosine_with_min_lr_schedule_with_warmup", w, STEPS, min_lr_rate=0.2),
        ),
        (
            {"lr_scheduler": "cosine_warmup_with_min_lr", "lr_scheduler_min_lr_ratio": 0.2},
            lambda w: made_by("get_cosine_with_min_lr_schedule_with_warmup_lr_rate", w, STEPS, min_lr_rate=0.2),
        ),
        (
            {"lr_scheduler": "polynomial", "lr_scheduler_power": 2.0},
            lambda w: made_by("get_polynomial_decay_schedule_with_warmup", w, STEPS, power=2.0),
        ),
        ({"lr_scheduler": "constant_with_warmup"}, lambda w: made_by("get_constant_schedule_with_warmup", w)),
        ({"lr_scheduler": "inverse_sqrt"}, lambda w: made_by("get_inverse_sqrt_schedule", w)),
        (
            {"lr_scheduler": "inverse_sqrt", "lr_scheduler_timescale": 20},
            lambda w: made_by("get_inverse_sqrt_schedule", w, timescale=20),
        ),
        (
            {"lr_scheduler": "warmup_stable_decay", "lr_decay_steps": 12, "lr_scheduler_min_lr_ratio": 0.1},
            lambda w: made_by("get_wsd_schedule", w, 12, num_stable_steps=STEPS - 12 - w, min_lr_ratio=0.1),
        ),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else None,
)
def test_rates_are_those_of_transformers(settings: dict[str, Any], make: Callable[[int], Any], warmup: int) -> None:
    assert ours(**settings, lr_warmup_steps=warmup) == pytest.approx(reference(make(warmup)), rel=1e-9, abs=1e-15)


def test_constant_is_the_base_rate() -> None:
    assert ours() == reference(made_by("get_constant_schedule"))


@pytest.mark.parametrize("case", json.loads(GOLDEN.read_text(encoding="utf-8"))["rex_lr"], ids=str)
def test_rex_gives_the_recorded_values(case: dict[str, Any]) -> None:
    asked, largest = case["kw"], 1e-3
    shape = tuple(f"{key}={asked[key]}" for key in ("rex_alpha", "rex_beta") if key in asked)
    config = ScheduleConfig(
        lr_scheduler="rex", lr_scheduler_min_lr_ratio=asked["min_lr"] / largest, lr_scheduler_args=shape
    )
    factor = build_schedule(config, total=asked["num_steps"], base_rate=largest)
    rates = [largest * factor(step) for step in range(asked["num_steps"])]
    assert rates == pytest.approx(case["lr"], abs=5e-10)  # recorded to nine places


def test_rex_rises_from_zero_and_follows_rex_after_the_warm_up() -> None:
    rates = ours(lr_scheduler="rex", lr_warmup_steps=10)
    assert rates[:11] == pytest.approx([BASE * step / 10 for step in range(11)])
    plain = build_schedule(ScheduleConfig(lr_scheduler="rex"), total=STEPS - 10, base_rate=BASE)
    assert rates[10:] == pytest.approx([BASE * plain(step) for step in range(STEPS - 10)])


def test_piecewise_constant_follows_its_rules_in_any_order() -> None:
    rules = ("step_rules=0.1:20,1:10,0.01",)
    rates = ours(lr_scheduler="piecewise_constant", lr_scheduler_args=rules)
    assert rates == pytest.approx([BASE] * 10 + [0.1 * BASE] * 10 + [0.01 * BASE] * 30)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"lr_scheduler": "piecewise_constant"}, "needs --lr_scheduler_args step_rules="),
        ({"lr_scheduler": "piecewise_constant", "lr_scheduler_args": ("step_rules=1:a,2",)}, "should look like"),
        ({"lr_scheduler": "cosine", "lr_scheduler_args": ("rex_alpha=1",)}, "cosine takes none"),
        ({"lr_scheduler": "rex", "lr_scheduler_args": ("rex_alfa=1",)}, "did you mean 'rex_alpha'"),
        ({"lr_scheduler": "rex", "lr_scheduler_args": ("rex_beta=-1",)}, "must be a number above 0"),
        ({"lr_scheduler": "cosin"}, "did you mean 'cosine'"),
    ],
)
def test_wrong_arguments_are_named(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says.replace("(", r"\(")):
        ours(**settings)


def test_an_optimizer_that_schedules_itself_keeps_its_rate() -> None:
    factor = build_schedule(ScheduleConfig(lr_scheduler="cosine"), total=10, base_rate=BASE, constant_rate=True)
    assert [factor(step) for step in range(10)] == [1.0] * 10


@pytest.mark.parametrize(("amount", "steps"), [(0, 0), (1, 1), (30, 30), (0.1, 20), (1.0, 200), (0.0, 0)])
def test_whole_numbers_are_steps_and_fractions_shares_of_the_run(amount: int | float, steps: int) -> None:
    assert in_steps(amount, 200) == steps
