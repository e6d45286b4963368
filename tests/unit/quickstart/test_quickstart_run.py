"""What the quickstart starts, where it writes, and what it refuses to touch."""

import logging
from pathlib import Path

import pytest
import torch

from tests.tiny import TinyDataset, TinyWan
from wanlora.foundation.errors import ConfigError
from wanlora.quickstart import run
from wanlora.quickstart.run import MARKER, Recipe, Run, Step, plan, quickstart


@pytest.fixture
def _nothing_shown(tiny_models: TinyWan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only programs run; models are the tests' own."""
    monkeypatch.setattr(run, "copy_pretrained", lambda folder: tiny_models)
    monkeypatch.setattr(run, "_show", lambda *_: ("it moves",))


def test_it_runs_the_three_real_programs_on_its_own_files(
    tiny_models: TinyWan, tiny_dataset: TinyDataset, tmp_path: Path
) -> None:
    folder = Run(folder=tmp_path / "with space" / "run_1")
    steps = plan(tiny_models, tiny_dataset, folder, Recipe(learning_rate=3e-3, rank=4, steps=30))
    assert [step.module for step in steps] == [
        "wanlora.cli.cache_latents",
        "wanlora.cli.cache_text_encoder_outputs",
        "wanlora.cli.train_network",
    ]
    for step in steps:
        assert step.flags[:2] == ("--dataset_config", str(tiny_dataset.toml))
    flags = dict(zip(steps[2].flags, steps[2].flags[1:], strict=False))
    assert flags["--dit"] == str(tiny_models.dit)
    assert flags["--output_dir"] == str(tmp_path / "with space" / "run_1" / "output")
    assert (flags["--learning_rate"], flags["--network_dim"], flags["--max_train_steps"]) == ("0.003", "4", "30")
    assert {"--fp8_scaled", "--sample_at_first", "--save_state"} <= set(steps[2].flags)


def test_a_card_trains_longer_and_saves_memory(tiny_models: TinyWan, tiny_dataset: TinyDataset, tmp_path: Path) -> None:
    on_card, on_cpu = (Recipe.for_device(torch.device(name), seed=1) for name in ("cuda", "cpu"))
    assert on_card.steps > on_cpu.steps
    memory = {"--gradient_checkpointing", "--blocks_to_swap"}
    run_1 = Run(folder=tmp_path)
    assert memory <= set(plan(tiny_models, tiny_dataset, run_1, on_card)[2].flags)
    assert not memory & set(plan(tiny_models, tiny_dataset, run_1, on_cpu)[2].flags)


def test_a_folder_with_files_of_somebody_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(ConfigError, match="did not make"):
        quickstart(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match="is a file"):
        quickstart(tmp_path / "out")


@pytest.mark.usefixtures("_nothing_shown")
def test_programs_run_in_order_and_find_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    step = Step(title="a look", module="wanlora.foundation.errors", flags=())
    monkeypatch.setattr(run, "plan", lambda *_: (step, step))
    out = tmp_path / "quickstart"
    with caplog.at_level(logging.INFO, "wanlora"):
        assert quickstart(out) == 0
    assert "1 of 3: a look" in caplog.text and "2 of 3: a look" in caplog.text
    assert "it moves" in caplog.text
    assert str(out / "dataset" / "dataset.toml") in caplog.text
    assert "python wan_cache_latents.py" in caplog.text
    assert (out / MARKER).is_file()


@pytest.mark.usefixtures("_nothing_shown")
def test_the_exit_code_of_a_program_that_fails_is_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    steps = (Step(title="bad", module="json.tool", flags=("absent.json",)), Step(title="never", module="x", flags=()))
    monkeypatch.setattr(run, "plan", lambda *_: steps)
    code = quickstart(tmp_path / "quickstart")
    assert code != 0
    assert f"bad ended with exit code {code}" in caplog.text
    assert "never" not in caplog.text


@pytest.mark.usefixtures("_nothing_shown")
def test_a_second_call_keeps_what_is_there_and_trains_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []

    def record(models: TinyWan, dataset: TinyDataset, folder: Run, recipe: Recipe) -> tuple[Step, ...]:
        runs.append(folder.folder.name)
        folder.output.mkdir(parents=True)
        return ()

    monkeypatch.setattr(run, "plan", record)
    quickstart(tmp_path)
    clip = tmp_path / "dataset" / "videos" / "scene_01.mp4"
    before = clip.stat().st_mtime_ns
    quickstart(tmp_path)
    assert runs == ["run_1", "run_2"]
    assert clip.stat().st_mtime_ns == before
