"""Launches that cannot work, the number format of the maths, and one process among none."""

import pytest
import torch

from tests.unit.training.parts import CPU, engine
from wanlora.config.train import RunConfig
from wanlora.foundation.errors import ConfigError
from wanlora.training.engine import Engine, check_ranks, compute_dtype

CUDA = torch.device("cuda")


def test_processes_without_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigError, match="accelerate launch --multi_gpu --num_processes 4"):
        Engine.start(RunConfig(device="cpu"))


def test_processes_that_each_believe_to_be_alone_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="started 2 processes, but this one sees 1"):
        check_ranks(1)


def test_a_launch_of_one_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    check_ranks(1)


@pytest.mark.parametrize("device", ["cuda:99", "tpu", "nonsense"])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    with pytest.raises(ConfigError, match=f"--device {device}"):
        Engine.start(RunConfig(device=device))


BF16, FP16, FP32, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("flag", "launcher", "stored", "expected"),
    [
        ("bf16", None, FP32, BF16),
        ("fp16", None, BF16, FP16),
        ("no", None, FP32, FP32),
        (None, None, BF16, BF16),
        (None, None, FP16, FP16),
        (None, None, FP8, BF16),
        (None, "bf16", FP32, BF16),
        ("no", "bf16", FP32, FP32),
        (None, "no", FP32, FP32),
    ],
)
def test_the_number_format_is_the_flags_then_the_launchers_then_the_files(
    monkeypatch: pytest.MonkeyPatch,
    flag: str | None,
    launcher: str | None,
    stored: torch.dtype,
    expected: torch.dtype,
) -> None:
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if launcher:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    assert compute_dtype(flag, stored, CUDA) is expected


def test_fp16_without_a_card_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs a CUDA card"):
        compute_dtype("fp16", BF16, CPU)


def test_the_launchers_fp8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(ConfigError, match="'fp8'"):
        compute_dtype(None, BF16, CUDA)


def test_one_process_exchanges_nothing() -> None:
    alone = engine()
    value = torch.tensor([1.0, 2.0])
    parameter = torch.nn.Parameter(torch.ones(2))
    alone.sum_gradients([parameter])
    assert parameter.grad is None
    assert alone.sum(value) is value
    assert alone.from_main("seed") == "seed"
    assert alone.gather_objects(3) == [3]
    assert alone.rank.is_main
