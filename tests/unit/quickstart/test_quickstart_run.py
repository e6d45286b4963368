"""What the quickstart starts, where it writes, and what it refuses to touch."""

import logging
from pathlib import Path

import pytest

from tests.tiny import TinyDataset, TinyWan
from wanlora.foundation.errors import ConfigError
from wanlora.quickstart import run
from wanlora.quickstart.run import MARKER, Step, plan, quickstart


def test_it_runs_the_three_real_programs_on_its_own_files(
    tiny_models: TinyWan, tiny_dataset: TinyDataset, tmp_path: Path
) -> None:
    steps = plan(tiny_models, tiny_dataset, tmp_path / "with space" / "run_1")
    assert [step.module for step in steps] == [
        "wanlora.cli.cache_latents",
        "wanlora.cli.cache_text_encoder_outputs",
        "wanlora.cli.train_network",
    ]
    for step in steps:
        assert step.flags[:2] == ("--dataset_config", str(tiny_dataset.toml))
    flags = steps[2].flags
    assert flags[flags.index("--dit") + 1] == str(tiny_models.dit)
    assert flags[flags.index("--output_dir") + 1] == str(tmp_path / "with space" / "run_1" / "output")
    assert {"--fp8_scaled", "--gradient_checkpointing", "--sample_at_first", "--save_state"} <= set(flags)


def test_a_folder_with_files_of_somebody_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(ConfigError, match="did not make"):
        quickstart(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match="is a file"):
        quickstart(tmp_path / "out")


def test_programs_run_in_order_and_find_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    step = Step(title="a look", module="wanlora.foundation.errors", flags=())
    monkeypatch.setattr(run, "plan", lambda *_: (step, step))
    out = tmp_path / "quickstart"
    with caplog.at_level(logging.INFO, "wanlora"):
        assert quickstart(out) == 0
    assert "1 of 2: a look" in caplog.text and "2 of 2: a look" in caplog.text
    assert str(out / "dataset" / "dataset.toml") in caplog.text
    assert "python wan_cache_latents.py" in caplog.text
    assert (out / MARKER).is_file()


def test_the_exit_code_of_a_program_that_fails_is_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    steps = (Step(title="bad", module="json.tool", flags=("absent.json",)), Step(title="never", module="x", flags=()))
    monkeypatch.setattr(run, "plan", lambda *_: steps)
    code = quickstart(tmp_path / "quickstart")
    assert code != 0
    assert f"bad ended with exit code {code}" in caplog.text
    assert "never" not in caplog.text


def test_a_second_call_keeps_what_is_there_and_trains_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []

    def record(models: TinyWan, dataset: TinyDataset, folder: Path) -> tuple[Step, ...]:
        runs.append(folder.name)
        (folder / "output").mkdir(parents=True)
        return ()

    monkeypatch.setattr(run, "plan", record)
    quickstart(tmp_path)
    clip = tmp_path / "dataset" / "videos" / "scene_01.mp4"
    before = clip.stat().st_mtime_ns
    quickstart(tmp_path)
    assert runs == ["run_1", "run_2"]
    assert clip.stat().st_mtime_ns == before
