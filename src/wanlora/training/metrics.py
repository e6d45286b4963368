"""What is recorded of every step: the progress bar, the trackers, and a file of one JSON line per step.

The file `<output_name>-steps.jsonl` in the output folder is for programs and for comparing runs: every number is
written so that it reads back exactly. A resumed run cuts it back to the step it resumes from. A validation is a line of
its own behind that of its step.
"""

import json
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from wanlora.foundation.files import write_text
from wanlora.foundation.log import warn_once
from wanlora.training.position import Position
from wanlora.training.step import StepReport, is_finite

VALIDATION_LOSS = "loss/validation"
"""The key that tells the line of a validation from that of a step."""
Tracker = Callable[[Mapping[str, float], int], None]


class StepLog:
    """The file of one line per step."""

    def __init__(self, path: Path, *, first_step: int) -> None:
        self.path = path
        kept = [row for row in _read_rows(path) if row["step"] <= first_step] if first_step else []
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))
        self._file = path.open("a", encoding="utf-8", newline="\n")

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one line; it is on its way to the disk when this returns. A full disk does not end the run."""
        try:
            self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
            self._file.flush()
        except OSError as error:
            warn_once(f"{self.path} cannot be written ({error}); training goes on without it")

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):
            self._file.close()


def read_steps(path: Path) -> list[dict[str, Any]]:
    """The lines of the steps in a step log; a last line that was cut off is left out."""
    return [row for row in _read_rows(path) if VALIDATION_LOSS not in row]


def read_validations(path: Path) -> list[dict[str, Any]]:
    """The lines of the validations in a step log."""
    return [row for row in _read_rows(path) if VALIDATION_LOSS in row]


def _read_rows(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows


class Metrics:
    """Averages losses and hands every step to the bar, the trackers and the file (main process only)."""

    def __init__(
        self,
        *,
        position: Position,
        total_steps: int,
        window: int,
        tracker: Tracker,
        log: StepLog | None,
        losses: list[float],
    ) -> None:
        self.losses: deque[float] = deque(losses, maxlen=window)
        """The last epoch's losses, oldest first; saved with the state."""
        self.tracker = tracker
        self.log = log
        shown = log is not None
        self.bar = tqdm(
            total=total_steps, initial=position.step, desc="steps", unit="step", disable=not shown, smoothing=0.1
        )

    @property
    def average(self) -> float:
        """The mean loss over the last epoch's worth of steps."""
        return sum(self.losses) / len(self.losses) if self.losses else 0.0

    def record(self, report: StepReport, position: Position, extra: Mapping[str, float]) -> None:
        """Take note of the step that led to `position`."""
        self.losses.append(report.loss)
        values = {
            "loss/current": report.loss,
            "loss/average": self.average,
            "grad_norm": report.grad_norm,
            **extra,
        }
        self.tracker(values, position.step)
        if self.log:
            self.log.write(
                {
                    "step": position.step,
                    "epoch": position.epoch,
                    "loss": report.loss,
                    "grad_norm": report.grad_norm,
                    **extra,
                    "items": report.names,
                    "t": report.timesteps,
                }
            )
        self.bar.set_postfix(loss=f"{report.loss:.4f}", avr_loss=f"{self.average:.4f}", refresh=False)
        self.bar.update()

    def record_validation(self, values: Mapping[str, float], position: Position) -> None:
        """Take note of losses measured at `position`; what is not finite stands as null in the file."""
        self.tracker(values, position.step)
        if self.log:
            finite = {name: value if is_finite(value) else None for name, value in values.items()}
            self.log.write({"step": position.step, "epoch": position.epoch, **finite})

    def end_epoch(self, position: Position) -> None:
        """Log the mean loss of the epoch that has just ended."""
        self.tracker({"loss/epoch": self.average, "epoch": float(position.epoch)}, position.step)

    def close(self) -> None:
        """End the bar and the file."""
        self.bar.close()
        if self.log:
            self.log.close()
