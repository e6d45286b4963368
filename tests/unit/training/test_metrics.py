"""What is recorded of every step."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from wanlora.training.metrics import Metrics, StepLog, read_steps
from wanlora.training.position import Position
from wanlora.training.step import StepReport


def report(loss: float) -> StepReport:
    return StepReport(loss=loss, grad_norm=0.5, names=("clip",), timesteps=(0.25,))


class Tracked:
    """Remembers what a tracker is given."""

    def __init__(self) -> None:
        self.rows: list[tuple[dict[str, float], int]] = []

    def __call__(self, values: Mapping[str, float], step: int) -> None:
        self.rows.append((dict(values), step))


def metrics(log: StepLog | None, tracked: Tracked, losses: list[float], window: int = 3) -> Metrics:
    return Metrics(position=Position(), total_steps=9, window=window, tracker=tracked, log=log, losses=losses)


def test_the_average_is_over_the_last_epochs_worth_of_steps() -> None:
    tracked = Tracked()
    made = metrics(None, tracked, losses=[8.0, 4.0])
    for step, loss in enumerate((3.0, 5.0, 1.0), 1):
        made.record(report(loss), Position(step=step), {"lr/unet": 1e-4})
    assert [values["loss/average"] for values, _ in tracked.rows] == [5.0, 4.0, 3.0]
    assert tracked.rows[-1] == (
        {"loss/current": 1.0, "loss/average": 3.0, "grad_norm": 0.5, "lr/unet": 1e-4},
        3,
    )
    made.end_epoch(Position(step=3, epoch=1))
    assert tracked.rows[-1] == ({"loss/epoch": 3.0, "epoch": 1.0}, 3)


def test_numbers_are_read_back_from_the_file_exactly(tmp_path: Path) -> None:
    log = StepLog(tmp_path / "steps.jsonl", first_step=0)
    made = metrics(log, Tracked(), losses=[])
    made.record(report(1 / 3), Position(step=1), {"lr/unet": 0.1 + 0.2})
    assert read_steps(log.path) == [
        {
            "step": 1,
            "epoch": 0,
            "loss": 1 / 3,
            "grad_norm": 0.5,
            "lr/unet": 0.1 + 0.2,
            "items": ["clip"],
            "t": [0.25],
        }
    ]
    made.close()


def test_a_resumed_run_cuts_the_file_back_and_appends(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    log = StepLog(path, first_step=0)
    for step in range(1, 6):
        log.write({"step": step})
    log.close()
    resumed = StepLog(path, first_step=3)
    resumed.write({"step": 4, "again": True})
    resumed.close()
    assert read_steps(path) == [{"step": 1}, {"step": 2}, {"step": 3}, {"step": 4, "again": True}]


def test_a_new_run_begins_a_new_file(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    path.write_text('{"step": 1}\n')
    StepLog(path, first_step=0).close()
    assert read_steps(path) == []


def test_a_last_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    assert read_steps(path) == [{"step": 1}, {"step": 2}]
    log = StepLog(path, first_step=3)
    log.write({"step": 4})
    log.close()
    assert read_steps(path) == [{"step": 1}, {"step": 2}, {"step": 4}]


def test_a_full_disk_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = StepLog(tmp_path / "steps.jsonl", first_step=0)

    class Full:
        def write(self, text: str) -> None:
            raise OSError("No space left on device")

        def close(self) -> None:
            raise OSError("No space left on device")

    monkeypatch.setattr(log, "_file", Full())
    made = metrics(log, Tracked(), losses=[])
    made.record(report(2.0), Position(step=1), {})
    made.close()
    assert made.average == 2.0
