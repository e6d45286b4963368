"""Rounding to e4m3 with a scale per row, and the product of what was rounded."""

import os

import pytest
import torch
from torch import Tensor

from wanlora.quantization import scaled_matmul as module
from wanlora.quantization.scaled_matmul import choose_kernel, fits, missing_fp8_maths, quantize_rows, scaled_matmul

WORKSPACE = "CUBLASLT_WORKSPACE_SIZE"
CPU = torch.device("cpu")


def dequantized(fp8: Tensor, scale: Tensor) -> Tensor:
    return fp8.float() * scale


def test_every_row_uses_the_whole_range_whatever_its_size() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 256) * torch.tensor([1e-12, 1e-3, 1.0, 1e3, 1e20])[:, None]
    fp8, scale = quantize_rows(x)
    assert fp8.dtype is torch.float8_e4m3fn and (scale.shape, scale.dtype) == ((5, 1), torch.float32)
    assert torch.equal(fp8.float().abs().amax(dim=1), torch.full((5,), 448.0))
    errors = (dequantized(fp8, scale).double() - x.double()).norm(dim=1) / x.double().norm(dim=1)
    assert (errors > 0.015).all() and (errors < 0.03).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_numbers_that_e4m3_has_are_kept(dtype: torch.dtype) -> None:
    x = torch.tensor([[448.0, -1.5, 0.0, 2.0**-9], [-7.0, 3.5, 0.109375, 0.0]], dtype=dtype)
    assert torch.equal(dequantized(*quantize_rows(x)).to(dtype), x)


def test_rows_of_zeros_stay_zeros_and_what_is_not_finite_shows() -> None:
    x = torch.zeros(3, 16)
    x[1, 3], x[2, 4] = torch.inf, torch.nan
    values = dequantized(*quantize_rows(x))
    assert not values[0].any()
    assert values[1, 3].isnan() and values[2].isnan().any()


def test_the_product_applies_both_scales_and_the_bias() -> None:
    torch.manual_seed(0)
    a, scale_a = quantize_rows(torch.randn(7, 48))
    b, scale_b = quantize_rows(torch.randn(32, 48) * torch.logspace(-3, 3, 32)[:, None])
    bias = torch.randn(32)
    found = scaled_matmul(a, scale_a, b, scale_b.squeeze(1), bias, dtype=torch.float32, kernel="emulated")
    expected = dequantized(a, scale_a).double() @ dequantized(b, scale_b).double().t() + bias
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    narrow = scaled_matmul(a, scale_a, b, scale_b.squeeze(1), None, dtype=torch.bfloat16, kernel="emulated")
    assert narrow.dtype is torch.bfloat16


def test_sides_of_sixteen_fit() -> None:
    assert fits(5120, 13824) and fits(16, 32)
    assert not fits(5120, 100) and not fits(100, 5120)


def test_a_processor_emulates_and_is_said_to_lack_the_units() -> None:
    assert choose_kernel(CPU) == "emulated"
    assert missing_fp8_maths(CPU) == "there is no CUDA card"


@pytest.mark.parametrize(("capability", "lacks"), [((8, 0), True), ((8, 6), True), ((8, 9), False), ((12, 0), False)])
def test_cards_before_ada_lack_the_units(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], lacks: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Card")
    monkeypatch.setattr(module, "_try", lambda kernel, device: None)
    missing = missing_fp8_maths(torch.device("cuda", 0))
    assert (missing is not None) == lacks
    if missing is not None:
        assert f"NVIDIA Card (sm_{capability[0]}{capability[1]}) has no units for it" in missing


@pytest.mark.parametrize(("capability", "given", "found"), [((9, 0), "", "0"), ((9, 0), "64", "64"), ((8, 9), "", "")])
def test_products_on_hopper_take_no_workspace_unless_the_user_has_given_them_one(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], given: str, found: str
) -> None:
    monkeypatch.setenv(WORKSPACE, given)
    if not given:
        monkeypatch.delenv(WORKSPACE)
    seen = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(module, "_try", lambda kernel, device: seen.append(os.environ.get(WORKSPACE, "")))
    assert missing_fp8_maths(torch.device("cuda", 0)) is None and seen == [found]


def test_where_the_library_knows_no_scales_for_rows_they_are_applied_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    working: set[str] = set()

    def attempt(kernel: str, device: torch.device) -> None:
        if kernel not in working:
            raise RuntimeError(f"{kernel} is not supported\nand more")

    monkeypatch.setattr(module, "_try", attempt)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    card = torch.device("cuda", 0)
    for works, kernel in ((("tensor",), "tensor"), (("tensor", "rows"), "rows")):
        choose_kernel.cache_clear()
        working = set(works)
        assert choose_kernel(card) == kernel and missing_fp8_maths(card) is None
    choose_kernel.cache_clear()
    working = set()
    assert missing_fp8_maths(card) == "this PyTorch cannot do it on this card (tensor is not supported)"
