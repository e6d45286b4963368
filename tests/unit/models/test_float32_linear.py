"""Linears that compute in float32: large weights are widened some rows at a time, with the same result."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from wanlora.models.wan import layers
from wanlora.models.wan.layers import Float32Linear

INTO, OUT = 24, 50
ROWS = 7
"""Rows of a piece; the last one of `OUT` has one."""


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "_WIDENED", ROWS * INTO * 4 + 3)


def linear(dtype: torch.dtype = torch.bfloat16, out: int = OUT) -> Float32Linear:
    torch.manual_seed(0)
    return Float32Linear(INTO, out).to(dtype).requires_grad_(False)


def row(samples: int = 2, **options: Any) -> Tensor:
    return torch.randn(samples, INTO, generator=torch.Generator().manual_seed(1), **options)


class Sizes(TorchDispatchMode):
    """Numbers of all float32 tensors that operations make, views aside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype == torch.float32 and not func.is_view:
            self.seen.append(out.numel())
        return out


def sizes_of(work: Callable[[], Tensor]) -> list[int]:
    with Sizes() as sizes:
        work()
    return sizes.seen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("out", [ROWS, 2 * ROWS, OUT])
def test_pieces_give_the_plain_product_and_gradient(dtype: torch.dtype, out: int) -> None:
    layer = linear(dtype, out)
    x, same = row(requires_grad=True), row(requires_grad=True)
    y, expected = layer(x), F.linear(same, layer.weight.float(), layer.bias.float())
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, expected)
    weights = torch.randn(y.shape)
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(x.grad, same.grad)


def test_no_copy_of_the_whole_weight_is_made() -> None:
    layer = linear()
    sizes = sizes_of(lambda: layer(row().bfloat16()))
    assert sizes.count(ROWS * INTO) == OUT // ROWS
    assert max(sizes) == ROWS * INTO


def test_small_and_trained_weights_are_widened_whole_and_float32_not_at_all() -> None:
    small, trained, wide = linear(out=ROWS), linear().requires_grad_(True), linear(torch.float32)
    assert sizes_of(lambda: small(row())).count(ROWS * INTO) == 1
    assert sizes_of(lambda: trained(row())).count(OUT * INTO) == 1
    assert max(sizes_of(lambda: wide(row()))) == 2 * OUT
    trained(row()).sum().backward()
    assert trained.weight.grad is not None and trained.weight.grad.dtype == torch.bfloat16
