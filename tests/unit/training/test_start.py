"""What a start does while something else is done."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from tests.runs import TrainingFolder
from wanlora.cli.train_network import choices, main
from wanlora.config.flags import parse_train
from wanlora.config.train import TrainConfig
from wanlora.training import run as runs
from wanlora.training.plan import Target
from wanlora.training.planning import card_to_start, present_target
from wanlora.training.prepare import Prepared, prepare


def test_the_card_is_started_during_the_checks_and_is_there_before_it_is_asked_for(
    training_folder: TrainingFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[object] = []

    @contextmanager
    def starting_card(index: int | None) -> Iterator[None]:
        events.append(index)
        yield
        events.append("started")

    def check(config: TrainConfig) -> Prepared:
        events.append("checks")
        return prepare(config)

    def ask(config: TrainConfig) -> Target:
        events.append("asked")
        return present_target(config)

    monkeypatch.setattr(runs, "card_to_start", lambda config: 1)
    monkeypatch.setattr(runs, "starting_card", starting_card)
    monkeypatch.setattr(runs, "prepare", check)
    monkeypatch.setattr(runs, "present_target", ask)
    training_folder.train(training_folder.arguments("style", "--max_train_steps", "1", "--dry_run"))
    assert events == [1, "checks", "started", "asked"]


def test_the_card_to_start_is_the_one_of_this_process_and_wrong_flags_are_left_to_the_checks(
    training_folder: TrainingFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    for device, index in (("cpu", None), ("cuda", 1), ("cuda:0", 0), ("cuda:2", None), ("tpu", None)):
        config = parse_train(training_folder.arguments("style", "--device", device), choices())
        assert card_to_start(config) == index
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert main(training_folder.arguments("style", "--device", "cuda:2", "--optimizer_type", "nowhere.Adam")) == 2
    text = training_folder.capture.readouterr().err
    assert "--device cuda:2" in text and "nowhere.Adam cannot be imported" in text


def test_ctrl_c_ends_what_is_being_compiled(training_folder: TrainingFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    def interrupted(trainer: runs.Trainer) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "abandon_compiling", lambda: events.append("abandoned"))
    monkeypatch.setattr(runs.Trainer, "train", interrupted)
    assert main(training_folder.arguments("style", "--max_train_steps", "1")) == 130
    assert events == ["abandoned"]
    assert "stopped by Ctrl-C" in training_folder.capture.readouterr().err
