"""When files are written, what they are called, and which give way."""

from pathlib import Path
from typing import Any

import pytest

from wanlora.config.outputs import SavingConfig
from wanlora.foundation.errors import CheckpointError
from wanlora.foundation.log import log
from wanlora.training.checkpoints import Checkpoints
from wanlora.training.position import Position, steps_per_epoch
from wanlora.training.state import remove_state

STEPS_PER_EPOCH = 5


class Disk:
    """A folder in which files and states are written by name; `full` makes every write fail."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.full = False
        self.recorded: list[str] = []

    def model(self, path: Path, position: Position) -> None:
        if self.full:
            raise OSError("No space left on device")
        path.write_text(str(position))

    def state(self, path: Path, position: Position, saved: list[str]) -> None:
        path.mkdir(exist_ok=True)
        (path / "run.json").write_text(str(position))
        self.recorded = saved

    def names(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()}


def checkpoints(disk: Disk, total: int, saved: list[str] | None = None, **settings: Any) -> Checkpoints:
    config = SavingConfig(output_dir=disk.folder, output_name="style", **settings)
    return Checkpoints(config, save_model=disk.model, save_state=disk.state, total_steps=total, saved=saved)


def run(made: Checkpoints, until: int, start: int = 0) -> None:
    """Take the steps after `start` up to `until`, in epochs of five."""
    assert steps_per_epoch(STEPS_PER_EPOCH, 1) == STEPS_PER_EPOCH
    for step in range(start + 1, until + 1):
        epoch, batch = divmod(step, STEPS_PER_EPOCH)
        made.when_due(Position(step=step, epoch=epoch, batch=batch), epoch_ended=batch == 0)


def musubi_keeps(numbers: list[int], reach: int) -> set[int]:
    """Each save removes the newest one that lies `reach` back or further, as musubi does."""
    kept: set[int] = set()
    for number in numbers:
        kept.add(number)
        old = [other for other in numbers if other <= number - reach]
        kept.discard(max(old, default=0))
    return kept


def test_names_are_those_of_musubi(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    run(checkpoints(disk, 15, save_every_n_epochs=1, save_every_n_steps=4, save_state=True), 15)
    stems = {"style", "style-000001", "style-000002", *(f"style-step{step:08d}" for step in (4, 8, 12))}
    assert disk.names() == {f"{stem}.safetensors" for stem in stems} | {f"{stem}-state" for stem in stems}


def test_the_end_is_saved_once_under_the_plain_name(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    run(checkpoints(disk, 10, save_every_n_epochs=1, save_every_n_steps=5, save_state_on_train_end=True), 10)
    assert disk.names() == {
        "style-000001.safetensors",
        "style-step00000005.safetensors",
        "style.safetensors",
        "style-state",
    }


@pytest.mark.parametrize(("every", "last"), [(1, 1), (1, 3), (2, 2), (3, 1)])
def test_as_many_epochs_are_kept_as_musubi_keeps(tmp_path: Path, every: int, last: int) -> None:
    disk = Disk(tmp_path)
    run(checkpoints(disk, 1000, save_every_n_epochs=every, save_last_n_epochs=last), 12 * STEPS_PER_EPOCH)
    expected = musubi_keeps(list(range(every, 13, every)), every * last)
    assert disk.names() == {f"style-{epoch:06d}.safetensors" for epoch in expected}
    assert len(expected) == last


@pytest.mark.parametrize(("every", "last"), [(2, 4), (3, 7), (5, 5), (4, 1)])
def test_as_many_steps_are_kept_as_musubi_keeps(tmp_path: Path, every: int, last: int) -> None:
    disk = Disk(tmp_path)
    run(checkpoints(disk, 1000, save_every_n_steps=every, save_last_n_steps=last), 60)
    expected = musubi_keeps(list(range(every, 61, every)), last + 1)
    assert disk.names() == {f"style-step{step:08d}.safetensors" for step in expected}


def test_states_are_kept_for_as_long_as_their_own_flag_says(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    settings: dict[str, Any] = {
        "save_every_n_epochs": 1,
        "save_last_n_epochs": 3,
        "save_last_n_epochs_state": 1,
        "save_state": True,
    }
    run(checkpoints(disk, 1000, **settings), 5 * STEPS_PER_EPOCH)
    files = {f"style-{epoch:06d}.safetensors" for epoch in (3, 4, 5)}
    assert disk.names() == files | {"style-000005-state"}


def test_files_that_this_run_did_not_write_stay(tmp_path: Path) -> None:
    foreign = {"style-000001.safetensors", "style-000002-state", "style_v2-000001.safetensors"}
    for name in foreign:
        (tmp_path / name).mkdir() if name.endswith("state") else (tmp_path / name).touch()
    disk = Disk(tmp_path)
    made = checkpoints(disk, 1000, save_every_n_epochs=1, save_last_n_epochs=1)
    run(made, 6 * STEPS_PER_EPOCH, start=3 * STEPS_PER_EPOCH)
    assert disk.names() == foreign | {"style-000006.safetensors"}


def test_a_resumed_run_removes_what_it_wrote_before(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    settings: dict[str, Any] = {"save_every_n_epochs": 1, "save_last_n_epochs": 2, "save_state": True}
    run(checkpoints(disk, 1000, **settings), 2 * STEPS_PER_EPOCH)
    resumed = checkpoints(disk, 1000, saved=disk.recorded, **settings)
    run(resumed, 3 * STEPS_PER_EPOCH, start=2 * STEPS_PER_EPOCH)
    assert disk.names() == {f"style-00000{n}{end}" for n in (2, 3) for end in (".safetensors", "-state")}


def test_nothing_old_is_removed_when_the_new_file_cannot_be_written(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    made = checkpoints(disk, 20, save_every_n_epochs=1, save_last_n_epochs=1)
    run(made, STEPS_PER_EPOCH)
    disk.full = True
    run(made, 2 * STEPS_PER_EPOCH, start=STEPS_PER_EPOCH)
    assert disk.names() == {"style-000001.safetensors"}
    disk.full = False
    run(made, 3 * STEPS_PER_EPOCH, start=2 * STEPS_PER_EPOCH)
    assert disk.names() == {"style-000003.safetensors"}
    disk.full = True
    with pytest.raises(CheckpointError, match=r"style\.safetensors, the end of the run.*No space.*--resume latest"):
        made.when_due(Position(step=20, epoch=4), epoch_ended=True)
    assert not made.finished


def test_a_run_whose_last_state_finds_no_room_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    disk = Disk(tmp_path)
    made = checkpoints(disk, 3, save_state=True)

    def no_room(*anything: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(made, "save_state", no_room)
    monkeypatch.setattr(log, "propagate", True)
    run(made, 3)
    assert made.finished
    assert disk.names() == {"style.safetensors"}
    assert "style-state could not be saved (No space left on device); the LoRA is whole" in caplog.text


def test_a_file_that_cannot_be_removed_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(tmp_path)
    made = checkpoints(disk, 1000, save_every_n_epochs=1, save_last_n_epochs=1)
    run(made, STEPS_PER_EPOCH)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *arguments, **options: (_ for _ in ()).throw(PermissionError("in use")))
        run(made, 2 * STEPS_PER_EPOCH, start=STEPS_PER_EPOCH)
    assert disk.names() == {"style-000001.safetensors", "style-000002.safetensors"}
    run(made, 3 * STEPS_PER_EPOCH, start=2 * STEPS_PER_EPOCH)
    assert disk.names() == {"style-000003.safetensors"}


def test_a_stopped_run_is_saved_at_its_step_unless_it_has_just_been(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    made = checkpoints(disk, 1000, save_every_n_epochs=1, save_state=True)
    run(made, STEPS_PER_EPOCH)
    assert made.when_stopped(Position(step=5, epoch=1)) == tmp_path / "style-000001-state"
    assert made.when_stopped(Position(step=7, epoch=1, batch=2)) == tmp_path / "style-step00000007-state"
    assert (tmp_path / "style-step00000007.safetensors").is_file()


def test_a_run_that_is_stopped_after_its_last_step_is_a_finished_one(tmp_path: Path) -> None:
    made = checkpoints(Disk(tmp_path), 7)
    assert made.when_stopped(Position(step=7, epoch=1, batch=2)) == tmp_path / "style-state"
    assert (tmp_path / "style.safetensors").is_file() and made.finished


def test_a_removed_state_is_gone_under_its_name_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "style-000001-state"
    folder.mkdir()
    (folder / "run.json").touch()
    monkeypatch.setattr("shutil.rmtree", lambda *arguments, **options: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        remove_state(folder)
    assert not folder.exists()
