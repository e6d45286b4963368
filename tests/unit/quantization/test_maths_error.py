"""Measuring what fp8 maths change."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.unit.quantization.test_fast_linear import make_linear, relative
from wanlora.quantization.fast_linear import FastFp8Linear, fast_layers, wide_maths
from wanlora.quantization.maths_error import LayerErrors, compare_maths, cosine


class Tower(nn.Module):
    """Two frozen fp8 layers with a trained scale before each."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = make_linear(), make_linear(96, 128)
        self.gains = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x * self.gains[0]).relu() * self.gains[1])
        return out


def test_a_layers_error_is_its_own_over_all_passes() -> None:
    tower = Tower()
    inputs = [torch.randn(9, 128), torch.randn(4, 128)]
    with LayerErrors(fast_layers(tower)) as errors, torch.no_grad():
        for x in inputs:
            tower(x)
    found = errors.result()
    x = torch.cat(inputs)
    with torch.no_grad():
        hidden = tower.first(x)
        for name, layer, given in (("first", tower.first, x), ("second", tower.second, hidden.relu())):
            out = layer(given)
            with wide_maths([layer]):
                assert found[name] == pytest.approx(relative(out, layer(given)), rel=1e-3)
    assert not tower.first._forward_hooks


def test_a_pass_in_ordinary_maths_tells_the_same_errors_and_recomputed_calls_do_not_count() -> None:
    tower, x = Tower(), torch.randn(9, 128)
    layers = fast_layers(tower)
    calls = []
    tower.first.register_forward_hook(lambda *args: calls.append(args))
    errors = LayerErrors({"first": tower.first})
    found = compare_maths(
        lambda: checkpoint(tower, x, use_reentrant=False).square().mean(), [tower.gains], layers, errors
    )
    assert len(calls) == 4  # two passes, each with its recomputation
    assert fast_layers(tower) == layers and len(tower.first._forward_hooks) == 1
    assert found == compare_maths(lambda: tower(x).square().mean(), [tower.gains], layers)
    with LayerErrors({"first": tower.first}) as fast, torch.no_grad():
        tower(x)
    assert errors.result() == pytest.approx(fast.result(), rel=1e-6)


def test_loss_and_gradient_are_those_of_two_ordinary_backward_passes() -> None:
    tower, x = Tower(), torch.randn(9, 128)
    found = compare_maths(lambda: tower(x).square().mean(), [tower.gains], fast_layers(tower))
    losses, gradients = [], []
    for layers in ((), tuple(fast_layers(tower).values())):
        with wide_maths(layers):
            loss = tower(x).square().mean()
            gradients.append(torch.autograd.grad(loss, tower.gains)[0])
        losses.append(loss.item())
    assert (found.loss, found.exact_loss) == pytest.approx(tuple(losses))
    assert found.loss_error == pytest.approx(losses[0] / losses[1] - 1, abs=1e-6)
    assert found.cosine == pytest.approx(torch.cosine_similarity(gradients[0], gradients[1], dim=0).item(), abs=1e-6)
    assert tower.gains.grad is None


def test_a_parameter_that_nothing_depends_on_counts_as_zero() -> None:
    tower, x = Tower(), torch.randn(9, 128)
    unused = nn.Parameter(torch.ones(3))
    found = compare_maths(lambda: tower(x).square().mean(), [tower.gains, unused], fast_layers(tower))
    assert found.cosine > 0.99


def test_the_cosine_is_that_of_one_long_vector() -> None:
    one, other = [torch.tensor([1.0, 2.0]), torch.tensor([[2.0]])], [torch.tensor([2.0, 1.0]), torch.tensor([[2.0]])]
    assert cosine(one, other).item() == pytest.approx(8 / 9)
    assert cosine(one, [-part for part in one]).item() == pytest.approx(-1)
    assert cosine(one, [torch.zeros(2), torch.zeros(1, 1)]).item() == 0


def test_nothing_that_was_called_means_no_errors() -> None:
    layer: FastFp8Linear = make_linear()
    with LayerErrors({"a": layer}) as errors:
        pass
    assert errors.result() == {}
