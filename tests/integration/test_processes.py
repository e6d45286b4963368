"""Several processes share the work of one, and only the first of them writes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.runs import TrainingFolder
from wanlora.training.metrics import read_steps, read_validations
from wanlora.training.state import load_state

STEPS = "3"


def launch(num_processes: int, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """What `accelerate launch` starts on a machine without a GPU when it is asked for several."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(num_processes)]
    command += ["--main_process_port", port, "--num_cpu_threads_per_process", "1", "-m", "wanlora.cli.train_network"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, timeout=240)


@pytest.fixture(scope="module")
def _prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    lines = [f"A picture, number {n}. --w 32 --h 32 --f 1 --d {n} --s 1 --l 1" for n in range(3)]
    path.write_text("\n".join(lines))
    return path


def test_two_processes_equal_one_with_accumulation_two(training_folder: TrainingFolder, _prompts: Path) -> None:
    training_folder.add_validation()
    models = training_folder.models
    previews = ["--sample_prompts", str(_prompts), "--sample_every_n_steps", STEPS]
    previews += ["--vae", str(models.vae), "--t5", str(models.t5)]
    common = ["--mixed_precision", "no", "--max_train_steps", STEPS, "--save_state", "--network_dropout", "0.1"]
    one = training_folder.arguments("one", *common, *previews, "--gradient_accumulation_steps", "2")
    training_folder.train(one)
    done = launch(2, training_folder.arguments("two", *common, *previews))
    assert done.returncode == 0, done.stderr
    assert_equal_runs(training_folder.output)
    assert_written_once(training_folder.output)


def assert_equal_runs(output: Path) -> None:
    one, two = (read_steps(output / f"{name}-steps.jsonl") for name in ("one", "two"))
    assert [row["items"] for row in one] == [row["items"] for row in two]
    assert [row["t"] for row in one] == [row["t"] for row in two]
    torch.testing.assert_close([row["loss"] for row in one], [row["loss"] for row in two], rtol=1e-5, atol=0)
    first, second = (read_validations(output / f"{name}-steps.jsonl") for name in ("one", "two"))
    assert first[0] == second[0] and [row["step"] for row in first] == [row["step"] for row in second] == [0, 3]
    assert first[1]["loss/validation"] == pytest.approx(second[1]["loss/validation"], rel=1e-5)
    adapters = [load_state(output / f"{name}-state").adapter for name in ("one", "two")]
    torch.testing.assert_close(adapters[0], adapters[1], rtol=1e-5, atol=1e-7)


def assert_written_once(output: Path) -> None:
    """Files of a run are there once each, and each prompt was drawn once."""
    files = {path.name for path in output.iterdir()}
    assert files == {
        *(f"{name}{suffix}" for name in ("one", "two") for suffix in (".safetensors", "-state", "-steps.jsonl")),
        "sample",
    }
    for name in ("one", "two"):
        drawn = sorted(path.name for path in (output / "sample").glob(f"{name}_*"))
        assert [part.split("_")[2] for part in drawn] == ["00", "01", "02"]


def test_processes_that_do_not_find_each_other_are_refused(
    training_folder: TrainingFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {**os.environ, "WORLD_SIZE": "2"}
    arguments = training_folder.arguments("lonely", "--max_train_steps", "1")
    done = subprocess.run(
        [sys.executable, "-m", "wanlora.cli.train_network", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 2
    assert "accelerate launch --multi_gpu --num_processes 2" in done.stderr
    assert "Traceback" not in done.stderr
    assert not training_folder.output.exists()
