"""States come back as they were, exist wholly or not at all, and are found by name."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from wanlora.foundation.errors import CheckpointError
from wanlora.training import state as state_module
from wanlora.training.position import Position
from wanlora.training.state import (
    RunRecord,
    ValidationStanding,
    is_state_of,
    latest_state,
    load_state,
    read_record,
    save_state,
)


def record(step: int = 3) -> RunRecord:
    return RunRecord(
        position=Position(step=step, epoch=1, batch=2),
        seed=7,
        epoch_length=9,
        total_steps=90,
        losses=[0.1, 1 / 3],
        settings={"network_dim": "4"},
        saved=["style-000001.safetensors"],
    )


def save(folder: Path, step: int = 3, **changes: Any) -> None:
    weight = torch.nn.Parameter(torch.ones(2, 3))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    parts: dict[str, Any] = {
        "adapter": {"a.lora_down.weight": torch.full((2, 3), float(step))},
        "optimizer": optimizer.state_dict(),
        "rates": {"last_epoch": step},
        "scaler": {"scale": 1024.0},
    }
    save_state(folder, record(step), **{**parts, **changes})


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    save(tmp_path / "style-state")
    back = load_state(tmp_path / "style-state")
    assert back.record == record()
    assert torch.equal(back.adapter["a.lora_down.weight"], torch.full((2, 3), 3.0))
    assert torch.equal(back.optimizer["state"][0]["exp_avg"], torch.full((2, 3), 0.1))
    assert (back.rates, back.scaler) == ({"last_epoch": 3}, {"scale": 1024.0})


def test_what_validation_found_comes_back_and_may_be_absent(tmp_path: Path) -> None:
    found = ValidationStanding(key="samples", base=1 / 3, best=0.25, best_step=2)
    parts: dict[str, Any] = {"adapter": {"a": torch.ones(1)}, "optimizer": {}, "rates": {}, "scaler": {}}
    save_state(tmp_path / "style-state", replace(record(), validation=found), **parts)
    assert read_record(tmp_path / "style-state").validation == found
    path = tmp_path / "style-state" / "run.json"
    content = json.loads(path.read_text())
    del content["validation"]  # as states were before there was validation
    path.write_text(json.dumps(content))
    assert read_record(tmp_path / "style-state") == record()


@pytest.mark.parametrize("writer", ["save_tensors", "write_json", "_replace_folder"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["full", "ctrl-c"])
def test_a_failure_while_writing_leaves_the_old_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str, error: BaseException
) -> None:
    save(tmp_path / "style-state", step=3)

    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(state_module, writer, fail)
    with pytest.raises(type(error)):
        save(tmp_path / "style-state", step=6)
    assert load_state(tmp_path / "style-state").record.position.step == 3
    assert [path.name for path in tmp_path.iterdir()] == ["style-state"]


def test_a_full_disk_is_an_error_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save_on_a_full_disk(parts: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 218304 vs 218196")

    monkeypatch.setattr(torch, "save", save_on_a_full_disk)
    with pytest.raises(OSError, match=r"optimizer\.bin could not be written whole; is the disk full"):
        save(tmp_path / "style-state")
    assert not list(tmp_path.iterdir())


def test_the_old_state_comes_back_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "style-state"
    save(folder, step=3)
    rename = Path.rename

    def refuse_the_new(path: Path, target: Path) -> Path:
        if path.name.endswith(".tmp"):
            raise PermissionError("in use")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse_the_new)
    with pytest.raises(PermissionError):
        save(folder, step=6)
    assert load_state(folder).record.position.step == 3


def test_what_a_killed_process_leaves_is_no_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed right before the rename: everything is written, under the temporary name."""
    save(tmp_path / "style-000001-state", step=3)
    with monkeypatch.context() as patch:
        patch.setattr(state_module, "_replace_folder", lambda new, folder: None)
        save(tmp_path / "style-000002-state", step=6)
    assert len(list(tmp_path.iterdir())) == 2
    assert latest_state(tmp_path, "style") == tmp_path / "style-000001-state"


def test_a_newer_state_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    save(tmp_path / "style-state", step=3)
    save(tmp_path / "style-state", step=6)
    assert load_state(tmp_path / "style-state").record.position.step == 6
    assert [path.name for path in tmp_path.iterdir()] == ["style-state"]


@pytest.mark.parametrize(
    ("folder", "name", "belongs"),
    [
        ("style-state", "style", True),
        ("style-000003-state", "style", True),
        ("style-1000003-state", "style", True),
        ("style-step00001500-state", "style", True),
        ("style_v01-state", "style", False),
        ("style_v01-000003-state", "style", False),
        ("style-2-state", "style", False),
        ("style-2-000003-state", "style", False),
        ("style-2-000003-state", "style-2", True),
        ("style2-state", "style", False),
        ("style-step5-state", "style", False),
        ("style(1)-state", "style(1)", True),
    ],
)
def test_states_are_told_apart_by_name(folder: str, name: str, belongs: bool) -> None:
    assert is_state_of(folder, name) == belongs


def test_the_latest_state_is_the_one_that_has_come_furthest(tmp_path: Path) -> None:
    for name, step in {"style-000002-state": 10, "style-step00000012-state": 12, "style_b-state": 99}.items():
        save(tmp_path / name, step=step)
    (tmp_path / "style-000009-state").mkdir()
    assert latest_state(tmp_path, "style") == tmp_path / "style-step00000012-state"
    assert latest_state(tmp_path, "other") is None


def spoil(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content)


@pytest.mark.parametrize(
    ("content", "says"),
    [("{", "cannot be read"), ("[]", "cannot be read"), ('{"format": "wanlora state 9"}', "another version")],
)
def test_a_broken_record_is_named(tmp_path: Path, content: str, says: str) -> None:
    save(tmp_path / "style-state")
    spoil(tmp_path / "style-state", "run.json", content)
    with pytest.raises(CheckpointError, match=says) as error:
        read_record(tmp_path / "style-state")
    assert "run.json" in str(error.value)


def test_a_cut_off_optimizer_is_named(tmp_path: Path) -> None:
    save(tmp_path / "style-state")
    path = tmp_path / "style-state" / "optimizer.bin"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"optimizer\.bin cannot be read"):
        load_state(tmp_path / "style-state")


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (["scheduler.bin", "model.safetensors"], "a state of musubi's.*--network_weights"),
        (["notes.txt"], "holds no state"),
        (None, "does not exist"),
    ],
)
def test_other_folders_are_answered(tmp_path: Path, files: list[str] | None, says: str) -> None:
    folder = tmp_path / "style-state"
    if files is not None:
        folder.mkdir()
        for name in files:
            (folder / name).touch()
    with pytest.raises(CheckpointError, match=says):
        read_record(folder)
