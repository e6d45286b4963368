"""LoRA files made part of a model while it loads (`--base_weights`).

The update is added in float32 to each weight as it comes from the file, before it is rounded or quantised; adding it
to fp8 codes afterwards would give noise. Names in the files are looked up from the names of the tensors that pass by,
so no model has to exist yet. `finish` then refuses files of which a part was never used.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from wanlora.foundation.errors import CheckpointError, ConfigError
from wanlora.foundation.log import log
from wanlora.lora.files import LoRAFile, read_file, require_known
from wanlora.lora.spelling import spellings_of


class MergedLoRAs:
    """The `adjust` of `load_transformer`: W + sum over files of multiplier * alpha / r * up @ down.

    Multipliers that are not given are 1. All files are read at once. Raises `ConfigError` for too many multipliers and
    `CheckpointError` for a file that is no LoRA.
    """

    def __init__(self, paths: Sequence[Path], multipliers: Sequence[float] = ()) -> None:
        if len(multipliers) > len(paths):
            raise ConfigError(
                f"--base_weights_multiplier has {len(multipliers)} values for {len(paths)} files in --base_weights"
            )
        self.multipliers = (*multipliers, *[1.0] * (len(paths) - len(multipliers)))
        self.files = [read_file(path) for path in paths]
        self.used: list[set[str]] = [set() for _ in paths]
        self._seen: set[str] = set()

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor with all updates of the official `name` added: float32 if there are any, else `tensor` itself."""
        module, _, kind = name.rpartition(".")
        if kind not in {"weight", "bias"}:
            return tensor
        self._seen.add(module)
        spelled = tuple(spellings_of(module))
        for file, multiplier, used in zip(self.files, self.multipliers, self.used, strict=True):
            for key, delta in _updates(file, spelled, kind, tensor.device):
                _require_shape(file, key, delta.shape, name, tensor.shape)
                tensor = tensor.float() + multiplier * delta
                used.add(key)
        return tensor

    def check(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Raise `CheckpointError` if a file changes modules that a model with these tensors lacks or has otherwise."""
        modules = {name.rpartition(".")[0] for name in shapes}
        paths = {spelling: module for module in modules for spelling in spellings_of(module)}
        for file in self.files:
            changes = _changes(file)
            require_known(file.path, [key for key, (module, _, _) in changes.items() if module not in paths], modules)
            for key, (module, kind, shape) in changes.items():
                name = f"{paths[module]}.{kind}"
                _require_shape(file, key, shape, name, shapes.get(name, ()))

    def finish(self) -> None:
        """Say what was merged. Raises `CheckpointError` naming what is left of a file after the whole model went by."""
        for file, multiplier, used in zip(self.files, self.multipliers, self.used, strict=True):
            left = [key for key in (*file.loras, *file.differences) if key not in used]
            require_known(file.path, left, self._seen)
            log.info(f"merged {file.path} at {multiplier:g}: {len(used)} updates")


def _changes(file: LoRAFile) -> dict[str, tuple[str, str, Sequence[int]]]:
    """By key: the module as the file spells it, what is changed of it, and the shape of the change."""
    loras = {key: (key, "weight", (len(lora.up), lora.down.shape[1])) for key, lora in file.loras.items()}
    differences = {
        key: (key.rpartition(".")[0], "bias" if key.endswith(".diff_b") else "weight", tensor.shape)
        for key, tensor in file.differences.items()
    }
    return {**loras, **differences}


def _require_shape(file: LoRAFile, key: str, change: Sequence[int], name: str, shape: Sequence[int]) -> None:
    if tuple(change) != tuple(shape):
        raise CheckpointError(
            f"{file.path} was made for another model: its {key} changes a tensor of {list(change)}, "
            f"{name} is {list(shape)}; merge a LoRA of this model, or remove it from --base_weights"
        )


def _updates(file: LoRAFile, spelled: Sequence[str], kind: str, device: torch.device) -> list[tuple[str, Tensor]]:
    """Key in the file and float32 update, for one tensor of the module with these names."""
    found = []
    for name in spelled:
        if kind == "weight" and name in file.loras:
            found.append((name, file.loras[name].delta(device)))
        difference = f"{name}.{'diff' if kind == 'weight' else 'diff_b'}"
        if difference in file.differences:
            found.append((difference, file.differences[difference].to(device, torch.float32)))
    return found
