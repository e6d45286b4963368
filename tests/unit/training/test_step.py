"""One optimizer step: what it computes, and what it refuses."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.training.parts import Velocity, indexed, measure, noise, objective, step_of
from wanlora.foundation.random import Streams
from wanlora.training.position import Position
from wanlora.training.step import DivergedError, TrainingStep

START = Position()


def take(step: TrainingStep, numbers: list[int], position: Position = START, **options: Any) -> float:
    report = measure(step, indexed(numbers, **options), position, len(numbers))
    step.update(position)
    return report.loss


def test_a_step_over_several_batches_descends_on_the_mean_of_their_losses() -> None:
    model, other = Velocity(), Velocity()
    losses = [objective(other)(item.batch, 0, item.index).value for item in indexed([0, 1, 2])]
    mean = torch.stack(losses).mean()
    (gradient,) = torch.autograd.grad(mean, [other.mix])
    report = measure(step_of(model), indexed([0, 1, 2]), START, 3)
    assert report.loss == pytest.approx(mean.item())
    assert report.grad_norm == pytest.approx(gradient.norm().item())
    assert report.names == ("clip0_0", "clip1_0", "clip2_0")
    torch.testing.assert_close(model.mix.grad, gradient)
    before = model.mix.detach().clone()
    step_of(model).update(START)
    torch.testing.assert_close(model.mix.detach(), before - gradient)


def test_gradients_are_clipped_to_the_limit_and_0_leaves_them() -> None:
    free, clipped = Velocity(), Velocity()
    norm = measure(step_of(free), indexed([0]), START, 1).grad_norm
    report = measure(step_of(clipped, max_grad_norm=norm / 4), indexed([0]), START, 1)
    assert report.grad_norm == pytest.approx(norm)
    assert free.mix.grad is not None and clipped.mix.grad is not None
    assert free.mix.grad.norm().item() == pytest.approx(norm)
    torch.testing.assert_close(clipped.mix.grad, free.mix.grad / 4)


def test_the_rate_is_that_of_the_steps_number() -> None:
    model = Velocity()
    before = model.mix.detach().clone()
    take(step_of(model, rate=lambda step: 0.0 if step < 5 else 1.0), [0], Position(step=4))
    assert torch.equal(model.mix, before)
    take(step_of(model, rate=lambda step: 0.0 if step < 5 else 1.0), [0], Position(step=5))
    assert not torch.equal(model.mix, before)


def explode(gradient: Tensor) -> Tensor:
    return gradient * float("inf")


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_numbers_that_are_none_change_nothing_and_are_named(broken: str) -> None:
    model = Velocity()
    step = step_of(model)
    before = model.mix.detach().clone()
    share = indexed([0]) + indexed([1], fill=float("nan") if broken == "loss" else None)
    if broken == "gradient":
        model.mix.register_hook(explode)
    with pytest.raises(DivergedError) as error:
        measure(step, share, Position(step=41), 2)
    assert torch.equal(model.mix, before)
    assert model.mix.grad is None
    message = str(error.value)
    assert f"the {broken} of step 42" in message
    assert "clip0_0 (t = " in message and "clip1_0 (t = " in message
    assert "--learning_rate" in message and "--resume" in message


def test_dropout_repeats_at_the_same_place_whatever_came_before() -> None:
    losses = []
    for warm in (0, 3):
        model = Velocity()
        model.dropout.p = 0.5
        step = step_of(model, rate=lambda step: 0.0)
        for number in range(warm):
            take(step, [number])
        losses.append(take(step, [5], Position(step=9)))
    assert losses[0] == losses[1]
    torch.manual_seed(Streams(7).seed("dropout", 0, 5))
    model = Velocity()
    model.dropout.p = 0.5
    (item,) = indexed([5])
    assert objective(model)(item.batch, 0, 5).value.item() == pytest.approx(losses[0])


def test_the_loss_scaler_changes_nothing_but_the_scale() -> None:
    plain, scaled = Velocity(), Velocity()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    one = take(step_of(plain, max_grad_norm=1.0), [0, 1])
    other = take(step_of(scaled, max_grad_norm=1.0, scaler=scaler), [0, 1])
    assert one == pytest.approx(other)
    torch.testing.assert_close(plain.mix, scaled.mix)


def test_an_overflow_of_the_scaled_gradient_skips_the_update_and_lowers_the_scale() -> None:
    model = Velocity()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    step = step_of(model, scaler=scaler)
    handle = model.mix.register_hook(explode)
    before = model.mix.detach().clone()
    report = measure(step, indexed([0]), START, 1)
    step.update(START)
    assert report.skipped
    assert torch.equal(model.mix, before)
    assert scaler.get_scale() == 2.0**9
    handle.remove()
    take(step, [1])
    assert not torch.equal(model.mix, before)


def test_a_batch_has_the_same_noise_alone_and_in_company() -> None:
    alone = measure(step_of(Velocity(), made=noise()), indexed([1]), START, 1)
    together = measure(step_of(Velocity(), made=noise()), indexed([0, 1]), START, 2)
    assert together.timesteps[1:] == alone.timesteps
