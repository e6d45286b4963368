"""The kernel for norm and SiLU is trusted only where it gives what the separate operations give."""

import logging
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from wanlora.foundation.log import log
from wanlora.models.wan import vae_kernels
from wanlora.models.wan.vae_kernels import RowKernel, activate_rows
from wanlora.models.wan.vae_layers import ChannelNorm

DTYPES = (torch.float32, torch.bfloat16)


def right(x: Tensor, gamma: Tensor, out: Tensor) -> None:
    out.copy_(F.silu(F.normalize(x.float(), dim=1) * gamma.float() * x.shape[1] ** 0.5))


def too_large(x: Tensor, gamma: Tensor, out: Tensor) -> None:
    right(x, gamma, out)
    out.mul_(1.05)


def wrong_in_the_last_row(x: Tensor, gamma: Tensor, out: Tensor) -> None:
    right(x, gamma, out)
    out[-1, :, -1, -1, -1] = 0


def nothing_for_zeros(x: Tensor, gamma: Tensor, out: Tensor) -> None:
    right(x, gamma, out)
    out[(x == 0).all(dim=1, keepdim=True).expand_as(out)] = float("nan")


def beyond_its_frames(x: Tensor, gamma: Tensor, out: Tensor) -> None:
    right(x, gamma, out)
    out.as_strided((1,), (1,), out.storage_offset() - 1).zero_()


def raising(x: Tensor, gamma: Tensor, out: Tensor) -> None:
    raise RuntimeError("no kernel image is available for this device\nand more")


@pytest.fixture(autouse=True)
def everywhere(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """The kernel is asked on a CPU too, nothing is remembered, and what is said is seen."""
    monkeypatch.setattr(vae_kernels, "_serves", lambda x, out: True)
    monkeypatch.setattr("wanlora.foundation.log._said", set())
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level(logging.INFO, logger="wanlora")
    vae_kernels._checked_kernel.cache_clear()
    yield
    vae_kernels._checked_kernel.cache_clear()


def substitute(monkeypatch: pytest.MonkeyPatch, kernel: RowKernel) -> None:
    monkeypatch.setattr(vae_kernels, "_load_kernel", lambda: kernel)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_kernel_that_is_right_is_used(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[tuple[int, ...]] = []

    def counted(x: Tensor, gamma: Tensor, out: Tensor) -> None:
        calls.append(tuple(x.shape))
        right(x, gamma, out)

    substitute(monkeypatch, counted)
    x = torch.randn(1, 8, 2, 3, 3).to(dtype)
    out = torch.empty_like(x)
    assert activate_rows(x, torch.ones(8, 1, 1, 1, dtype=dtype), out)
    num_checks = len(calls) - 1
    assert calls[-1] == (1, 8, 2, 3, 3) and num_checks == len(vae_kernels._SHAPES)
    assert activate_rows(x, torch.ones(8, 1, 1, 1, dtype=dtype), out)
    assert len(calls) == num_checks + 2  # the comparison is made once
    assert caplog.messages == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        (too_large, "its kernel is off by 0."),
        (wrong_in_the_last_row, "its kernel is off by"),
        (nothing_for_zeros, "its kernel is off by nan"),
        (beyond_its_frames, "its kernel is off by 7"),
        (raising, "Triton cannot be used (no kernel image is available for this device)"),
    ],
)
def test_a_kernel_that_is_wrong_or_fails_gives_way_to_the_operations(
    kernel: RowKernel,
    said: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    substitute(monkeypatch, kernel)
    norm = ChannelNorm(8).to(dtype).requires_grad_(False)
    x = torch.randn(1, 8, 2, 3, 3).to(dtype)
    out = torch.empty_like(x)
    for _ in range(2):
        norm.activate(x, out)
    torch.testing.assert_close(out, F.silu(norm(x)))
    assert len(caplog.messages) == 1 and said in caplog.text


def test_without_triton_the_operations_serve(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def missing() -> RowKernel:
        raise ImportError("No module named 'triton'")

    monkeypatch.setattr(vae_kernels, "_load_kernel", missing)
    x = torch.randn(1, 8, 1, 2, 2)
    assert not activate_rows(x, torch.ones(8, 1, 1, 1), torch.empty_like(x))
    assert "Triton cannot be used (No module named 'triton')" in caplog.text
