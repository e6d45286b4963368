"""A run that is stopped and resumed is the run that was never stopped, bit for bit."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.runs import TrainingFolder
from wanlora.training.metrics import read_steps
from wanlora.training.state import load_state

TOTAL = 6
COMPARED = ("step", "epoch", "loss", "grad_norm", "lr/unet", "items", "t")


def compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: row[key] for key in COMPARED} for row in rows]


def run_in_a_new_process(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "wanlora.cli.train_network", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("first_stop", "extra"),
    [
        pytest.param(3, ["--max_data_loader_n_workers", "2", "--persistent_data_loader_workers"], id="inside-an-epoch"),
        pytest.param(
            3,
            [
                *("--max_data_loader_n_workers", "0", "--gradient_accumulation_steps", "2", "--network_dropout", "0.1"),
                *("--lr_scheduler", "cosine", "--optimizer_type", "adamw8bit", "--num_timestep_buckets", "4"),
            ],
            id="accumulation-dropout-cosine-8bit",
        ),
    ],
)
def test_three_steps_and_three_more_equal_six(
    training_folder: TrainingFolder, first_stop: int, extra: list[str]
) -> None:
    whole = training_folder.arguments("whole", *extra, "--max_train_steps", str(TOTAL), "--save_state")
    training_folder.train(whole)
    parts = training_folder.arguments("parts", *extra, "--max_train_steps", str(TOTAL), "--save_state")
    training_folder.train([*parts, "--save_every_n_steps", str(first_stop)])
    state = training_folder.output / f"parts-step{first_stop:08d}-state"
    # The second half is trained once more from the middle, by a process that knows only what was saved.
    (training_folder.output / "parts.safetensors").unlink()
    run_in_a_new_process([*parts, "--resume", str(state)])
    assert_same_run(training_folder.output)


def assert_same_run(output: Path) -> None:
    whole, parts = (read_steps(output / f"{name}-steps.jsonl") for name in ("whole", "parts"))
    assert compared(whole) == compared(parts)
    assert [row["step"] for row in parts] == list(range(1, TOTAL + 1))
    one, other = (load_state(output / f"{name}-state") for name in ("whole", "parts"))
    assert one.record.position == other.record.position
    assert one.record.losses == other.record.losses
    assert one.adapter.keys() == other.adapter.keys()
    for name, tensor in one.adapter.items():
        assert torch.equal(tensor, other.adapter[name]), name
    assert_equal_nested(one.optimizer, other.optimizer)


def assert_equal_nested(one: Any, other: Any) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal_nested(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_equal_nested(left, right)
    else:
        assert one == other


def test_latest_finds_the_state_that_has_come_furthest(training_folder: TrainingFolder) -> None:
    first = training_folder.arguments("style", "--max_train_steps", "4", "--save_every_n_steps", "2", "--save_state")
    training_folder.train(first)
    more = training_folder.arguments("style", "--max_train_steps", "5", "--resume", "latest")
    text = training_folder.train(more)
    assert "resuming" in text and "step 4" in text
    assert [row["step"] for row in read_steps(training_folder.output / "style-steps.jsonl")] == [1, 2, 3, 4, 5]


def test_latest_without_a_state_says_so_and_begins(training_folder: TrainingFolder) -> None:
    text = training_folder.train(training_folder.arguments("new", "--max_train_steps", "1", "--resume", "latest"))
    assert "holds no state of new yet" in text
