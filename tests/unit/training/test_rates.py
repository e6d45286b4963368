"""Schedules applied to an optimizer, and carried over a stop."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from wanlora.foundation.errors import ConfigError
from wanlora.training.rates import ForeignRates, PureRates, Rates

STEPS = 6


def optimizer(*rates: float) -> Optimizer:
    return AdamW([{"params": [nn.Parameter(torch.ones(2))], "lr": rate} for rate in rates])


def walk(rates: Rates, optimizer: Optimizer, steps: range) -> list[list[float]]:
    seen = []
    for step in steps:
        rates.before(step)
        optimizer.step()
        seen.append([group["lr"] for group in optimizer.param_groups])
    return seen


def usual_walk(path: str, arguments: dict[str, object]) -> list[list[float]]:
    """The rates of a loop that steps the scheduler after each optimizer step."""
    built = optimizer(1.0)
    scheduler = getattr(torch.optim.lr_scheduler, path.split(".")[-1])(built, **arguments)
    seen = []
    for _ in range(STEPS):
        seen.append([group["lr"] for group in built.param_groups])
        built.step()
        scheduler.step()
    return seen


def test_every_group_follows_the_schedule_from_its_own_rate() -> None:
    built = optimizer(1.0, 16.0)
    assert walk(PureRates(built, lambda step: 1 / (step + 1)), built, range(3)) == [
        [1.0, 16.0],
        [0.5, 8.0],
        [1 / 3, 16 / 3],
    ]


def test_a_group_that_finds_its_own_rate_is_left_alone() -> None:
    built = optimizer(1.0)
    built.param_groups[0]["lr"] = None
    rates = PureRates(built, lambda step: 0.5)
    rates.before(3)
    assert built.param_groups[0]["lr"] is None


def test_a_pure_schedule_resumes_from_its_step_at_the_rate_of_this_run() -> None:
    first, second = optimizer(1.0), optimizer(2.0)
    walk(PureRates(first, lambda step: 1 - step / 10), first, range(3))
    rates = PureRates(second, lambda step: 1 - step / 10)
    second.load_state_dict(first.state_dict())
    assert walk(rates, second, range(3, 5)) == [[pytest.approx(1.4)], [pytest.approx(1.2)]]


@pytest.mark.parametrize(
    ("path", "arguments"),
    [
        ("CosineAnnealingWarmRestarts", {"T_0": 4}),
        ("torch.optim.lr_scheduler.MultiStepLR", {"milestones": [2, 4], "gamma": 0.5}),
    ],
)
def test_a_foreign_schedule_goes_on_where_it_stood(path: str, arguments: dict[str, object], tmp_path: Path) -> None:
    expected = usual_walk(path, arguments)
    first, second = optimizer(1.0), optimizer(1.0)
    rates = ForeignRates(first, path, arguments)
    begun = walk(rates, first, range(3))
    torch.save(rates.state_dict(), tmp_path / "rates")
    resumed = ForeignRates(second, path, arguments)
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(torch.load(tmp_path / "rates", weights_only=True))
    assert begun + walk(resumed, second, range(3, STEPS)) == expected


@pytest.mark.parametrize(
    ("path", "arguments"), [("no_such.Thing", {}), ("NoSuchLR", {}), ("StepLR", {}), ("StepLR", {"step": 3})]
)
def test_a_foreign_schedule_that_cannot_be_made_is_refused(path: str, arguments: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="--lr_scheduler_type"):
        ForeignRates(optimizer(1.0), path, arguments)


def test_a_foreign_schedules_state_does_not_pass_for_a_pure_one() -> None:
    with pytest.raises(ConfigError, match="give the same one to resume"):
        PureRates(optimizer(1.0), lambda step: 1.0).load_state_dict({"last_epoch": 3})
