"""What is said before a run, and the shares of noise levels."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from tests.runs import TrainingFolder
from tests.unit.training.conftest import Checked
from wanlora.cli.train_network import main
from wanlora.diffusion.timesteps import build_plan
from wanlora.foundation import log as log_module
from wanlora.foundation.shapes import LatentShape
from wanlora.training.announce import announce, level_shares
from wanlora.training.position import Position
from wanlora.training.prepare import Resume
from wanlora.training.settings import decisive_settings
from wanlora.training.state import RunRecord


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """The log of this test, with nothing said before."""
    monkeypatch.setattr(log_module, "_said", set())
    monkeypatch.setattr(log_module.log, "propagate", True)
    caplog.set_level(logging.INFO, logger="wanlora")
    return caplog


def test_data_length_and_corrections_are_said(checked: Checked, said: pytest.LogCaptureFixture) -> None:
    announce(*checked("--max_train_epochs", "3", "--gradient_accumulation_steps", "2"))
    assert "9 samples in 8 batches" in said.text
    assert "training t2v-14B for 3 epochs of 4 steps, 12 in all; 2 batches a step" in said.text
    assert "musubi-tuner tells it 1000 t + 1" in said.text


def test_a_length_in_steps_is_told_in_epochs(checked: Checked, said: pytest.LogCaptureFixture) -> None:
    announce(*checked("--max_train_steps", "20"))
    assert "training t2v-14B for 20 steps, 8 an epoch (2.5 epochs)" in said.text


def test_a_resumed_run_names_what_differs(checked: Checked, said: pytest.LogCaptureFixture) -> None:
    config, prepared = checked("--network_dropout", "0.1")
    settings = {**decisive_settings(config), "network_dropout": "None"}
    record = RunRecord(
        position=Position(step=7, epoch=1, batch=3), seed=1, epoch_length=5, total_steps=9, losses=[], settings=settings
    )
    announce(config, replace(prepared, resume=Resume(folder=Path("style-state"), record=record)))
    assert "resuming style-state: 1 epochs and 3 batches done, step 7" in said.text
    assert "network_dropout: None -> 0.1" in said.text
    assert "8 batches an epoch instead of 5; epoch 2 begins anew" in said.text


def test_validation_says_when_and_what_it_costs(
    checked: Checked, training_folder: TrainingFolder, said: pytest.LogCaptureFixture
) -> None:
    training_folder.add_validation()
    announce(*checked())
    assert "validation: 1 image x 1 + 3 clips x 1 window (5 frames) = 4 samples" in said.messages
    assert "3 validation clips are also trained on" in said.text
    assert "validation: 4 samples in 3 batches x 4 levels = 12 forward passes each time" in said.messages
    assert (
        "validation: before the first step, after every epoch and at the end; noise levels as in training" in said.text
    )
    announce(*checked("--validate_every_n_steps", "50", "--validate_every_n_epochs", "2", "--validation_levels", "1"))
    assert "validation: 4 samples in 3 batches x 1 level = 3 forward passes each time" in said.messages
    assert "after every 50 steps and every 2 epochs and at the end" in said.text
    assert "--timestep_sampling shift" in said.messages[-2]


def test_without_validation_nothing_is_said_unless_it_was_asked_for(
    checked: Checked, said: pytest.LogCaptureFixture
) -> None:
    announce(*checked())
    assert "validat" not in said.text
    announce(*checked("--validate_every_n_steps", "50"))
    assert "--validate_every_n_steps changes nothing: dataset.toml has no [[validation]]" in said.messages


def test_shares_of_noise_levels_add_up_and_follow_the_law() -> None:
    latent = LatentShape(21, 60, 104)
    assert level_shares(build_plan("uniform"), latent) == pytest.approx([0.05] * 20)
    shifted = level_shares(build_plan("shift", discrete_flow_shift=5.0), latent)
    assert sum(shifted) == pytest.approx(1)
    assert sum(shifted[10:]) > 0.9
    cut = level_shares(build_plan("uniform", min_timestep=500), latent)
    assert cut == pytest.approx([0.0] * 10 + [0.1] * 10)


def test_timesteps_are_shown_on_the_console(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--show_timesteps", "console", "--timestep_sampling", "uniform"]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if " to " in line and "%" in line]
    assert len(lines) == 20
    assert all("5.0%" in line and line.endswith("#" * 50) for line in lines)


def test_timesteps_are_drawn_as_a_picture(training_folder: TrainingFolder) -> None:
    output = ["--output_dir", str(training_folder.output), "--output_name", "style"]
    assert main(["--show_timesteps", "image", "--timestep_sampling", "sigmoid", *output]) == 0
    with Image.open(training_folder.output / "style-timesteps.png") as picture:
        blue = [picture.getpixel((24 + 32 * bar + 16, 330)) for bar in range(20)]
        top = [picture.getpixel((24 + 32 * bar + 16, 40)) for bar in (0, 10)]
    assert set(blue[8:12]) == {(70, 130, 180)}
    assert top == [(255, 255, 255), (70, 130, 180)]
