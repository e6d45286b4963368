"""All trained factors as one vector: the same update, and the same memory."""

from typing import Any

import pytest
import torch
from torch import nn

from tests.unit.training.parts import Velocity, indexed, measure, step_of
from wanlora.config.train import OptimizerConfig
from wanlora.training.flat import FlatGroups, FlatParameters
from wanlora.training.optimizers import choose_optimizer
from wanlora.training.position import Position


def factors(sizes: tuple[tuple[int, int], ...]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(size, generator=generator)) for size in sizes]


def groups_of(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
    """Two groups, as LoRA+ has them."""
    return [
        {"params": parameters[::2], "lr": 1e-2, "name": "unet"},
        {"params": parameters[1::2], "lr": 4e-2, "name": "unet plus"},
    ]


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_the_update_is_that_of_one_matrix_after_the_other(name: str) -> None:
    sizes = ((16, 256), (256, 32), (64, 128), (512, 16))  # large enough for states in eight bits
    plain, flattened = factors(sizes), factors(sizes)
    choice = choose_optimizer(OptimizerConfig(optimizer_type=name, learning_rate=1e-2), {"weight_decay": 0.1})
    flat = FlatGroups(groups_of(flattened))
    optimizers = choice.build(groups_of(plain)), choice.build(flat.groups)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        for one, other in zip(plain, flattened, strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        flat.collect()
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(plain, flattened, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-7)
        assert other.grad is None
    assert [group["name"] for group in optimizers[1].param_groups] == ["unet", "unet plus"]
    assert all(len(group["params"]) == 1 for group in optimizers[1].param_groups)


def test_parameters_are_views_of_the_vector_and_of_nothing_else() -> None:
    parameters = factors(((2, 3), (4, 1)))
    before = [parameter.detach().clone() for parameter in parameters]
    flat = FlatParameters(parameters)
    assert all(torch.equal(now, then) for now, then in zip(parameters, before, strict=True))
    flat.vector.data += 1
    assert all(torch.equal(now, then + 1) for now, then in zip(parameters, before, strict=True))
    parameters[0].data.zero_()
    assert flat.vector.tolist() == [0.0] * 6 + (before[1] + 1).flatten().tolist()


def test_a_parameter_without_a_gradient_counts_as_zero() -> None:
    parameters = factors(((2, 3), (4, 1)))
    flat = FlatParameters(parameters)
    parameters[1].grad = torch.ones(4, 1)
    flat.collect()
    assert flat.vector.grad is not None
    assert flat.vector.grad.tolist() == [0.0] * 6 + [1.0] * 4


def test_a_training_step_is_the_same_and_leaves_no_gradient() -> None:
    plain, model = Velocity(), Velocity()
    expected = step_of(plain)
    step = step_of(model, flat=True)
    for trained in (expected, step):
        report = measure(trained, indexed([0, 1]), Position(), 2)
        trained.update(Position())
        assert report.grad_norm > 0
    torch.testing.assert_close(model.mix, plain.mix)
    measure(step, indexed([2]), Position(), 1)
    step.drop_gradients()
    assert model.mix.grad is None and all(vector.grad is None for vector in step.parameters)


def test_only_optimizers_that_treat_each_number_alone_are_given_vectors() -> None:
    flat = {
        name: choose_optimizer(OptimizerConfig(optimizer_type=name, learning_rate=1e-2), {}).treats_numbers_alone
        for name in ("adamw", "AdamW8bit", "Muon", "prodigyopt.Prodigy")
    }
    assert flat == {"adamw": True, "AdamW8bit": True, "Muon": False, "prodigyopt.Prodigy": False}
