"""Weights in fp8: how exact, how clamped, and which ready-made scales are understood."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from wanlora.foundation.errors import CheckpointError
from wanlora.quantization.blockwise import FP8_MAX, dequantize, quantize_blockwise, relative_error, to_fp8
from wanlora.quantization.ready_made import as_block_scale


def random_weight(rows: int = 96, columns: int = 256) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02


def test_the_relative_error_of_normal_weights_is_two_and_a_half_percent() -> None:
    weight = random_weight()
    assert 0.022 < relative_error(weight, *quantize_blockwise(weight)) < 0.028


def test_each_block_of_64_inputs_has_the_scale_of_its_largest_weight() -> None:
    weight = random_weight()
    fp8, scale = quantize_blockwise(weight)
    assert fp8.dtype == torch.float8_e4m3fn and fp8.shape == weight.shape
    assert scale.dtype == torch.float32 and scale.shape == (96, 4, 1)
    largest = weight.view(96, 4, 64).abs().amax(-1, keepdim=True)
    assert torch.allclose(scale, largest / FP8_MAX)
    assert torch.allclose(dequantize(fp8, scale, torch.float32).view(96, 4, 64).abs().amax(-1, keepdim=True), largest)


def test_a_small_block_beside_a_large_one_keeps_its_precision() -> None:
    weight = random_weight()
    weight[:, :64] *= 1e-4
    fp8, scale = quantize_blockwise(weight)
    small = weight[:, :64]
    error = (dequantize(fp8, scale, torch.float32)[:, :64] - small).norm() / small.norm()
    assert error < 0.03


def test_widths_that_64_does_not_divide_have_one_scale_a_row() -> None:
    weight = random_weight(columns=100)
    fp8, scale = quantize_blockwise(weight)
    assert scale.shape == (96, 1, 1)
    assert relative_error(weight, fp8, scale) < 0.03


def test_a_row_of_zeros_stays_zero() -> None:
    fp8, scale = quantize_blockwise(torch.zeros(2, 64))
    assert torch.equal(dequantize(fp8, scale, torch.float32), torch.zeros(2, 64))


def test_quantising_leaves_the_weight_as_it_was() -> None:
    weight = random_weight()
    before = weight.clone()
    quantize_blockwise(weight)
    assert torch.equal(weight, before)


class _Casts(TorchDispatchMode):
    """Records the largest value handed to a cast to fp8."""

    def __init__(self) -> None:
        super().__init__()
        self.largest: list[float] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if (kwargs or {}).get("dtype") == torch.float8_e4m3fn:
            self.largest.append(float(args[0].abs().max()))
        return func(*args, **(kwargs or {}))


def test_nothing_over_448_is_ever_handed_to_the_cast() -> None:
    with _Casts() as casts:
        to_fp8(torch.tensor([[500.0, -1e6, 3.0]]))
        quantize_blockwise(random_weight() * 1e6)
    assert len(casts.largest) == 2 and max(casts.largest) == FP8_MAX


def test_the_product_with_the_scale_is_rounded_once() -> None:
    fp8, scale = quantize_blockwise(random_weight())
    exact = fp8.double().view(96, 4, 64) * scale.double()
    assert torch.equal(dequantize(fp8, scale, torch.bfloat16), exact.view(96, 256).to(torch.bfloat16))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((), (1, 1, 1)),
        ((1,), (1, 1, 1)),
        ((8,), (8, 1, 1)),
        ((8, 1), (8, 1, 1)),
        ((8, 2), (8, 2, 1)),
        ((8, 2, 1), (8, 2, 1)),
        ((1, 2), (1, 2, 1)),
        ((4, 2), (8, 2, 1)),
    ],
)
def test_ready_made_scales_of_every_shape_multiply_the_right_weights(
    shape: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    weight = torch.randn(8, 128).to(torch.float8_e4m3fn)
    given = torch.rand(shape) + 0.5
    scale = as_block_scale(given, (8, 128), "blocks.0.ffn.0.weight")
    assert scale.shape == expected
    grid = given.reshape(shape[0] if shape else 1, -1)
    spread = grid.repeat_interleave(8 // grid.shape[0], 0).repeat_interleave(128 // grid.shape[1], 1)
    assert torch.equal(dequantize(weight, scale, torch.float32), weight.float() * spread)


@pytest.mark.parametrize("shape", [(5,), (8, 3), (3, 2), (2, 2, 2)])
def test_a_scale_that_does_not_fit_is_refused_by_name(shape: tuple[int, ...]) -> None:
    with pytest.raises(CheckpointError, match=r"blocks\.0\.ffn\.0\.weight has shape"):
        as_block_scale(torch.ones(shape), (8, 128), "blocks.0.ffn.0.weight")
