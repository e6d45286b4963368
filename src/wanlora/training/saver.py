"""Writes the LoRA file and the state of a run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from wanlora.config.train import TrainConfig
from wanlora.foundation.dtypes import parse_dtype
from wanlora.foundation.errors import CheckpointError
from wanlora.lora.files import save_lora
from wanlora.lora.network import LoRANetwork
from wanlora.training.metrics import Metrics
from wanlora.training.optimizers import set_mode
from wanlora.training.position import Position
from wanlora.training.record import FileRecord
from wanlora.training.settings import decisive_settings
from wanlora.training.state import RunRecord, SavedState, save_state
from wanlora.training.step import TrainingStep
from wanlora.training.validation import Validation


class Saver:
    """Knows every part of a run that has to reach the disk."""

    def __init__(
        self,
        config: TrainConfig,
        *,
        network: LoRANetwork,
        step: TrainingStep,
        metrics: Metrics,
        validation: Validation,
        describe: FileRecord,
        seed: int,
        epoch_length: int,
        total_steps: int,
    ) -> None:
        self.config = config
        self.network = network
        self.step = step
        self.metrics = metrics
        self.validation = validation
        self.describe = describe
        self.seed = seed
        self.epoch_length = epoch_length
        self.total_steps = total_steps

    def save_model(self, path: Path, position: Position) -> None:
        """Write the LoRA file and read it back."""
        saving = self.config.saving
        set_mode(self.step.optimizer, training=False)
        try:
            save_lora(
                path,
                self.network,
                format=saving.save_format,
                dtype=parse_dtype(saving.save_precision or "float32"),
                metadata=self.describe(position),
            )
        finally:
            set_mode(self.step.optimizer, training=True)

    def save_state(self, folder: Path, position: Position, saved: list[str]) -> None:
        """Write what resuming needs."""
        step = self.step
        record = RunRecord(
            position=position,
            seed=self.seed,
            epoch_length=self.epoch_length,
            total_steps=self.total_steps,
            losses=list(self.metrics.losses),
            settings=decisive_settings(self.config),
            saved=saved,
            validation=self.validation.standing,
        )
        save_state(
            folder,
            record,
            adapter=self.network.state_dict(),
            optimizer=step.optimizer.state_dict(),
            rates=step.rates.state_dict(),
            scaler=step.scaler.state_dict() if step.scaler else {},
        )


def refuse_state_by_matrix(state: SavedState) -> None:
    """To be called where the optimizer is given one vector a group (`flat.py`), before anything is loaded.

    Raises `CheckpointError` if the state is of an earlier version, which gave it one matrix after the other.
    """
    groups = state.optimizer.get("param_groups", ())
    remembered = [value for values in state.optimizer.get("state", {}).values() for value in values.values()]
    by_matrix = any(len(group["params"]) > 1 for group in groups) or any(
        isinstance(value, Tensor) and value.ndim > 1 for value in remembered
    )
    if by_matrix:
        raise CheckpointError(
            f"--resume {state.path} was saved by an earlier version, which kept what the optimizer remembers matrix by "
            "matrix and not as one vector; finish that run with the earlier version, or begin a run with "
            "--network_weights and the LoRA beside the state"
        )


def restore(state: SavedState, network: LoRANetwork, step: TrainingStep, arguments: Mapping[str, Any]) -> None:
    """Put everything back as it was, except that the optimizer's `arguments` are those of this run.

    Raises `CheckpointError` if the state belongs to another kind of run.
    """
    network.load_state_dict(state.adapter)
    try:
        step.optimizer.load_state_dict(state.optimizer)
    except (ValueError, KeyError) as error:
        raise CheckpointError(
            f"{state.path} was saved with another optimizer or other parameter groups ({error}); resume with the "
            "--optimizer_type and --network_args it was made with"
        ) from error
    for group in step.optimizer.param_groups:
        group.update({name: value for name, value in arguments.items() if name in group})
    step.rates.load_state_dict(state.rates)
    if step.scaler and state.scaler:
        step.scaler.load_state_dict(state.scaler)
