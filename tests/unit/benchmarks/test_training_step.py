"""The benchmark itself, in small, and the peer that it runs beside the trainer."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import peer_diffusers, training_step
from benchmarks.materials import GEOMETRIES, Materials
from benchmarks.runs import Finished, Setting
from benchmarks.settings import SETTINGS
from wanlora.config.dataset import read_datasets
from wanlora.data.order import fixed_batches
from wanlora.data.plan import plan_datasets
from wanlora.training.metrics import read_steps

ROOT = Path(__file__).parents[3]


def test_the_benchmark_measures_every_bucket_with_the_real_trainer(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/training_step.py", "make", "time", "--geometry", "tiny"]
    command += ["--work", str(tmp_path), "--results", str(tmp_path / "results")]
    command += ["--configs", "reference-eager", "--warmup", "0", "--timed", "1"]
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (tmp_path / "results").glob("*.json")
    run = json.loads(path.read_text(encoding="utf-8"))["runs"]["reference-eager"]
    assert set(run["buckets"]) == {"96x96x1", "96x64x1", "96x64x5", "64x32x9"}
    weights = {"96x96x1": 120, "96x64x1": 240, "96x64x5": 240, "64x32x9": 480}
    seconds = sum(count * run["buckets"][bucket]["mean"] for bucket, count in weights.items())
    assert run["mix_seconds"] == seconds
    assert {bucket: figures["num_steps"] for bucket, figures in run["buckets"].items()} == {
        bucket: count // 120 for bucket, count in weights.items()
    }
    assert run["start_seconds"] > 0
    assert "mix s/epoch" in done.stdout


def test_a_batch_of_first_frames_is_held_against_a_clip_of_as_many_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    datasets = []

    def trained(setting: Setting, geometry: str, materials: Materials, *args: object) -> Finished:
        datasets.append(materials.dataset)
        names = ["96x64x1", "96x64x5"] * 2
        rows = [
            {"bucket": name, "seconds": second, "loss": 1.0} for name, second in zip(names, (9, 9, 2, 1), strict=True)
        ]
        return Finished(
            setting=setting, rows=rows, exit_code=0, total_seconds=1, start_seconds=1, stopped=False, log=[]
        )

    monkeypatch.setattr(training_step, "run_trainer", trained)
    flags = ["--geometry", "tiny", "--work", str(tmp_path), "--results", str(tmp_path / "results")]
    assert (
        training_step.main(["batch-short", "--configs", "keep,peer-eager", "--warmup", "1", "--timed", "1", *flags])
        == 0
    )
    assert "keep: 2 x 96x64x1 24 tokens/s, 96x64x5 48 tokens/s, ratio 0.500" in capsys.readouterr().out
    plan = plan_datasets(read_datasets(datasets[0]), sources_may_be_absent=True, write_index=False)
    assert sorted(len(batch.indexes) for batch in fixed_batches(plan)) == [1, 1, 2, 2]


def test_the_peer_trains_every_bucket_and_writes_what_the_trainers_log_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = GEOMETRIES["tiny"]
    small = replace(tiny, sizes=replace(tiny.sizes, num_layers=1), buckets=tiny.buckets[1:3])
    monkeypatch.setattr(peer_diffusers, "GEOMETRIES", {"tiny": small})
    assert peer_diffusers.main(["eager", "--geometry", "tiny", "--log", str(tmp_path / "log")]) == 0
    rows = read_steps(tmp_path / "log")
    assert [row["bucket"] for row in rows] == ["96x64x1"] * peer_diffusers.STEPS + ["96x64x5"] * peer_diffusers.STEPS
    assert all(row["seconds"] > 0 and row["loss"] > 0 for row in rows)


def test_a_peer_that_is_not_installed_is_named_with_the_cure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert peer_diffusers.main(["compile", "--log", str(tmp_path / "log")]) == 2
    assert "pip install diffusers peft" in capsys.readouterr().err


def test_peers_run_by_their_own_program_and_are_named_by_their_versions() -> None:
    setting = SETTINGS["peer-compile"]
    assert (setting.flags, setting.warmup(4), SETTINGS["keep"].warmup(4)) == (["compile"], peer_diffusers.WARMUP, 4)
    assert setting.label.startswith("diffusers ") and SETTINGS["keep"].label == "wanlora keep"


def test_settings_tell_how_many_blocks_a_model_must_have() -> None:
    numbers = {name: SETTINGS[name].swapped for name in ("keep", "swap-36", "auto-cap-24", "keep-cap-24-swap-20")}
    assert numbers == {"keep": 0, "swap-36": 36, "auto-cap-24": 0, "keep-cap-24-swap-20": 20}
