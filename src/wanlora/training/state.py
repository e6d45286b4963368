"""What a run needs to go on as if it had never stopped.

A state is a folder: the adapter's float32 weights, the optimizer's (and a custom scheduler's) state, and `run.json`
with the position, the seed and the losses of the running average. Randomness needs no more than the seed, because
every random number is a function of seed and position (foundation/random.py). The folder is written under a temporary
name and renamed when it is whole, and gets another name before it is removed, so a state either exists completely or
not at all.
"""

import json
import pickle
import re
import secrets
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wanlora.foundation.errors import CheckpointError
from wanlora.foundation.files import atomic_path, write_json
from wanlora.foundation.tensor_files import open_tensors, save_tensors
from wanlora.training.position import Position

FORMAT = "wanlora state 1"
STATE_SUFFIX = "-state"
ADAPTER = "model.safetensors"
_RUN, _OPTIMIZER = "run.json", "optimizer.bin"


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationStanding:
    """What validation has found so far."""

    key: str
    """Values under one key can be compared."""
    base: float | None = None
    """The loss of the model without the adapter; None if it could not be measured."""
    best: float | None = None
    best_step: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRecord:
    """The readable part of a state."""

    position: Position
    seed: int
    epoch_length: int
    """Batches an epoch, which `position.batch` counts."""
    total_steps: int
    """Where the run was to end, which most schedules of the learning rate depend on."""
    losses: list[float]
    """Of the last epoch, oldest first."""
    settings: dict[str, str] = field(default_factory=dict)
    """Those that change what a step computes; a resumed run names the ones that differ."""
    saved: list[str] = field(default_factory=list)
    """Files and folders that this run has written and may remove when newer ones take their place."""
    validation: ValidationStanding | None = None
    """None if nothing was measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedState:
    """A state read back."""

    path: Path
    record: RunRecord
    adapter: dict[str, Tensor]
    optimizer: dict[str, Any]
    rates: dict[str, Any]
    scaler: dict[str, Any]


def save_state(
    folder: Path,
    record: RunRecord,
    *,
    adapter: Mapping[str, Tensor],
    optimizer: Mapping[str, Any],
    rates: Mapping[str, Any],
    scaler: Mapping[str, Any],
) -> None:
    """Write a state folder whole or not at all; an older one of the same name gives way to it at the end."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = _hidden(folder, "tmp")
    try:
        temporary.mkdir()
        save_tensors(temporary / ADAPTER, adapter)
        parts = {"optimizer": dict(optimizer), "rates": dict(rates), "scaler": dict(scaler)}
        _save_parts(temporary / _OPTIMIZER, parts)
        write_json(temporary / _RUN, {"format": FORMAT, **asdict(record)})
        _replace_folder(temporary, folder)
    except BaseException:
        with suppress(OSError):
            shutil.rmtree(temporary)
        raise


def _save_parts(path: Path, parts: Mapping[str, Any]) -> None:
    with atomic_path(path) as temporary:
        try:
            torch.save(parts, temporary)
        except RuntimeError as error:  # all that torch says of a full disk is a position in the file
            raise OSError(f"{path.name} could not be written whole; is the disk full?") from error


def read_record(folder: Path) -> RunRecord:
    """The readable part of a state. Raises `CheckpointError` for anything that is no whole state of ours."""
    if not folder.is_dir():
        raise CheckpointError(
            f"--resume {folder} does not exist; give a folder whose name ends in {STATE_SUFFIX}, or latest"
        )
    if not (folder / _RUN).is_file():
        raise CheckpointError(_not_ours(folder))
    try:
        content = json.loads((folder / _RUN).read_text(encoding="utf-8"))
        if content.pop("format") != FORMAT:
            raise ValueError("it was written by another version")
        if content.get("validation") is not None:
            content["validation"] = ValidationStanding(**content["validation"])
        return RunRecord(**{**content, "position": Position(**content["position"])})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / _RUN} cannot be read ({error}); resume from another state") from error


def load_state(folder: Path) -> SavedState:
    """Read a whole state. Raises `CheckpointError`."""
    record = read_record(folder)
    with open_tensors(folder / ADAPTER) as source:
        adapter = {name: source.read(name).clone() for name in source.names}
    try:
        parts = torch.load(folder / _OPTIMIZER, map_location="cpu", weights_only=True)
        return SavedState(path=folder, record=record, adapter=adapter, **parts)
    except (OSError, RuntimeError, EOFError, TypeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{folder / _OPTIMIZER} cannot be read ({error}); resume from another state") from error


def latest_state(output_dir: Path, output_name: str) -> Path | None:
    """The state of `output_name` that has come furthest, or None. Unreadable ones are passed over."""
    found: list[tuple[int, Path]] = []
    for folder in output_dir.glob(f"*{STATE_SUFFIX}"):
        if is_state_of(folder.name, output_name):
            with suppress(CheckpointError):
                found.append((read_record(folder).position.step, folder))
    return max(found)[1] if found else None


def is_state_of(folder_name: str, output_name: str) -> bool:
    """Whether a folder's name is one that a run called `output_name` gives its states."""
    moment = r"(-\d{6,}|-step\d{8,})?"
    return re.fullmatch(re.escape(output_name) + moment + STATE_SUFFIX, folder_name) is not None


def remove_state(folder: Path) -> None:
    """Remove a state; what a crash leaves of it is no state any more. Raises `OSError` if that cannot be done."""
    shutil.rmtree(folder.rename(_hidden(folder, "old")))


def _replace_folder(new: Path, folder: Path) -> None:
    """Put `new` in the place of `folder`; the old one is removed only after that."""
    if not folder.exists():
        new.rename(folder)
        return
    old = folder.rename(_hidden(folder, "old"))
    try:
        new.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _hidden(folder: Path, kind: str) -> Path:
    return folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.{kind}")


def _not_ours(folder: Path) -> str:
    """Why a folder cannot be resumed from, with what to do instead."""
    if (folder / "scheduler.bin").is_file() or (folder / "random_states_0.pkl").is_file():
        return (
            f"--resume {folder} is a state of musubi's, which holds neither step nor position in the data; "
            "start a new run with --network_weights and the LoRA file saved beside it"
        )
    return f"--resume {folder} holds no state: {_RUN} is missing. Give a folder whose name ends in {STATE_SUFFIX}"
