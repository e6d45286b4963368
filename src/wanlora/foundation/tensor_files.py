"""Reading and writing files of named tensors.

`open_tensors` hides how a checkpoint is stored: one safetensors file, a set of shards, or an official `.pth`. Names,
shapes and dtypes are known from headers; a tensor is read when it is asked for, so a model is never in memory twice.
Files are mapped, not read, where the format allows it. Safetensors layout: github.com/huggingface/safetensors.
"""

import json
import pickle
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from wanlora.foundation.dtypes import SAFETENSORS_DTYPES
from wanlora.foundation.errors import CheckpointError
from wanlora.foundation.files import atomic_path

_SHARD = re.compile(r"^(?P<stem>.*)-(?P<index>\d{5})-of-(?P<count>\d{5})$")
_PICKLES = {".pth", ".pt", ".bin", ".ckpt"}


class TensorSource(ABC):
    """Named tensors on disk."""

    path: Path
    names: tuple[str, ...]
    metadata: dict[str, str]

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """The shape, without reading the data."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """The number format, without reading the data."""

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """The tensor, on the CPU."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the file."""

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def __enter__(self) -> "TensorSource":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class SafetensorsSource(TensorSource):
    """One `.safetensors` file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._header = _read_header(path)
        try:
            self._file: Any = safe_open(path, framework="pt", device="cpu").__enter__()
        except (SafetensorError, OSError, ValueError) as error:
            raise _broken(path, error) from error
        self.metadata = {str(key): str(value) for key, value in (self._header.pop("__metadata__", None) or {}).items()}
        self.names = tuple(self._header)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._header[name]["shape"])

    def dtype(self, name: str) -> torch.dtype:
        label = self._header[name]["dtype"]
        if label not in SAFETENSORS_DTYPES:
            raise CheckpointError(f"{self.path}: {name} is stored as {label}, a number format that cannot be read here")
        return SAFETENSORS_DTYPES[label]

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def close(self) -> None:
        self._file = None


class PickleSource(TensorSource):
    """An official `.pth`, read with `weights_only` so that it cannot run code."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata = {}
        content = _load_pickle(path)
        for wrapper in ("state_dict", "model_state", "module"):
            if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
                content = content[wrapper]
        if not isinstance(content, dict):
            raise CheckpointError(
                f"{path} holds a {type(content).__name__}, not named tensors; pass the model's weights file"
            )
        self._tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
        self.names = tuple(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def read(self, name: str) -> Tensor:
        return self._tensors[name]

    def close(self) -> None:
        self._tensors = {}


class ShardedSource(TensorSource):
    """Several files that together hold one model."""

    def __init__(self, path: Path, shards: list[Path]) -> None:
        self.path = path
        self._sources = [SafetensorsSource(shard) for shard in shards]
        self._owner = {name: source for source in self._sources for name in source.names}
        self.names = tuple(self._owner)
        self.metadata = dict(self._sources[0].metadata)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._owner[name].shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._owner[name].dtype(name)

    def read(self, name: str) -> Tensor:
        return self._owner[name].read(name)

    def close(self) -> None:
        for source in self._sources:
            source.close()


def open_tensors(path: Path) -> TensorSource:
    """Open a file of named tensors, or the set of shards that `path` belongs to.

    `path` is a `.safetensors` or `.pth` file, any one shard, an `….index.json`, or a folder with exactly one such set.
    Raises `CheckpointError` for a missing, cut off or foreign file and for missing shards.
    """
    if path.is_dir():
        path = _only_checkpoint_in(path)
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; check the spelling and the drive")
    if path.name.endswith(".index.json"):
        return ShardedSource(path, _shards_of_index(path))
    if _SHARD.match(path.stem) and path.suffix == ".safetensors":
        return ShardedSource(path, _shards_beside(path))
    if path.suffix.lower() in _PICKLES:
        return PickleSource(path)
    if path.suffix.lower() in {".safetensors", ".sft"}:
        return SafetensorsSource(path)
    raise CheckpointError(
        f"{path}: weights are read from .safetensors and .pth files, not from {path.suffix or 'this'} files"
    )


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a `.safetensors` file, whole or not at all. Raises `OSError` if the disk is full."""
    contiguous = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        try:
            save_file(contiguous, temporary, metadata=dict(metadata) if metadata else None)
        except SafetensorError as error:  # the library wraps the system's own error
            raise OSError(str(error)) from error


def _read_header(path: Path) -> dict[str, Any]:
    """The JSON header, checked against the length of the file."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = path.stat().st_size
            if not 2 <= length <= size - 8:
                raise ValueError(f"its header claims {length} bytes, the file has {size}")
            header: dict[str, Any] = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except OSError as error:
        raise _unreadable(path, error) from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise _broken(path, error) from error
    if ends and 8 + length + max(ends) > size:
        raise _broken(path, ValueError(f"it should have {8 + length + max(ends)} bytes and has {size}"))
    return header


def _broken(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} is cut off or is no safetensors file ({error}); fetch or make it again")


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read ({error.strerror or error}); check that you may open it")


def _load_pickle(path: Path) -> Any:
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):  # files older than torch 1.6 cannot be mapped
                raise
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors, and unpickling it could run foreign code, so it is refused; "
            "use the .safetensors version of the file"
        ) from error
    except PermissionError as error:
        raise _unreadable(path, error) from error
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is cut off or is no PyTorch weights file ({error}); fetch it again") from error


def _shards_of_index(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8-sig"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not an index of shards ({error}); fetch it again") from error
    return _require([index.with_name(name) for name in names])


def _shards_beside(shard: Path) -> list[Path]:
    match = _SHARD.match(shard.stem)
    assert match is not None
    count = int(match["count"])
    return _require(
        [shard.with_name(f"{match['stem']}-{n:05d}-of-{count:05d}{shard.suffix}") for n in range(1, count + 1)]
    )


def _require(shards: list[Path]) -> list[Path]:
    missing = [shard for shard in shards if not shard.is_file()]
    if missing:
        names = ", ".join(shard.name for shard in missing)
        raise CheckpointError(
            f"{shards[0].parent}: {len(missing)} of {len(shards)} shards are missing ({names}); fetch them"
        )
    return shards


def _only_checkpoint_in(folder: Path) -> Path:
    indexes = sorted(folder.glob("*.index.json"))
    if len(indexes) == 1:
        return indexes[0]
    files = [file for file in sorted(folder.glob("*.safetensors")) if not file.name.startswith(".")]
    sets = {match["stem"] if (match := _SHARD.match(file.stem)) else file.name: file for file in files}
    if len(sets) == 1:
        return next(iter(sets.values()))
    found = ", ".join(file.name for file in files) or "none"
    raise CheckpointError(f"{folder} is a folder; name the weights file in it (safetensors files there: {found})")
