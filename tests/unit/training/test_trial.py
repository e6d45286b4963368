"""The trial of the largest batch: what it tries, and that the run does not notice it."""

import pytest
import torch

from tests.runs import TrainingFolder
from tests.unit.training.conftest import Checked
from tests.unit.training.parts import Velocity, step_of
from wanlora.cli.train_network import main
from wanlora.foundation.shapes import PixelShape
from wanlora.training.metrics import read_steps
from wanlora.training.state import load_state
from wanlora.training.trial import Trial, largest_batch

STEPS = ("--max_train_steps", "5", "--network_dropout", "0.5", "--save_state_on_train_end")


def test_the_batch_with_the_most_tokens_is_tried(checked: Checked) -> None:
    _, prepared = checked()
    spec = largest_batch(prepared.plan)
    assert (spec.pixels, len(spec.indexes)) == (PixelShape(48, 32, 1), 2)  # 2 x 6 tokens; clips of 5 frames have 8
    assert len(spec.indexes) == 2


def test_a_run_with_a_trial_is_the_same_to_the_bit(training_folder: TrainingFolder) -> None:
    plain = training_folder.train(training_folder.arguments("plain", *STEPS))
    tried = training_folder.train(training_folder.arguments("tried", *STEPS, "--trial_step"))
    assert "trial of the largest batch, 48x32x1 x 2 (12 tokens): its memory suffices" in tried
    assert "trial of" not in plain
    rows = [read_steps(training_folder.output / f"{name}-steps.jsonl") for name in ("plain", "tried")]
    for row in (*rows[0], *rows[1]):
        del row["seconds"]
    assert rows[0] == rows[1] and len(rows[0]) == 5
    one, other = (load_state(training_folder.output / f"{name}-state") for name in ("plain", "tried"))
    assert all(torch.equal(one.adapter[name], other.adapter[name]) for name in one.adapter)


def test_a_resumed_run_is_tried_too(training_folder: TrainingFolder) -> None:
    arguments = training_folder.arguments("style", *STEPS, "--trial_step")
    training_folder.train(arguments)
    text = training_folder.train([*arguments, "--max_train_steps", "6", "--resume", "latest"])
    assert "trial of the largest batch" in text


def test_memory_that_does_not_suffice_ends_the_run_before_its_first_step(
    training_folder: TrainingFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Trial, "_pass", run_out)
    code = main(training_folder.arguments("style", *STEPS, "--trial_step"))
    text = training_folder.capture.readouterr().err
    assert code == 2 and "does not suffice for the model" in text and "Traceback" not in text
    assert read_steps(training_folder.output / "style-steps.jsonl") == []
    assert not list(training_folder.output.glob("*.safetensors"))


def test_the_place_of_what_the_optimizer_will_remember_is_taken(checked: Checked) -> None:
    step = step_of(Velocity())
    trial = Trial(checked()[1].plan, step, state_bytes=2.0)
    assert trial.missing_memory == 2 * 9
    step.optimizer.state[step.parameters[0]] = {"moment": torch.ones(9)}
    assert trial.missing_memory == 0
