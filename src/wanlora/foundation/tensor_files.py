"""Reading and writing files of named tensors.

`open_tensors` hides how a checkpoint is stored: one safetensors file, a set of shards, or an official `.pth`. Names,
shapes and dtypes are known from headers; a tensor is read when it is asked for, so a model is never in memory twice.
Single tensors are looked at through a map of the file; `read_all` reads many of them ahead, in the order of the file.
"""

import json
import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from wanlora.foundation.dtypes import SAFETENSORS_DTYPES
from wanlora.foundation.errors import CheckpointError
from wanlora.foundation.files import atomic_path
from wanlora.foundation.headers import broken_pickle, locate, read_header, unreadable, unwrap
from wanlora.foundation.reading import Wanted, read_ahead
from wanlora.foundation.writing import host_views

_FORMATS = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


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

    def read_all(self, names: Iterable[str], place: Callable[[str], torch.device]) -> Iterator[tuple[str, Tensor]]:
        """Each tensor where `place` says for its name, with the name, in an order that suits the file.

        A tensor may be a window into the file: copy what is to stay.
        """
        for name in names:
            yield name, self.read(name).to(place(name))

    @abstractmethod
    def close(self) -> None:
        """Let go of the file."""

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class SafetensorsSource(TensorSource):
    """One `.safetensors` file. It is mapped only once a tensor is read: some systems count a map as memory in use."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header = read_header(path)
        self._file: Any = None
        self.metadata = dict(self.header.metadata)
        self.names = self.header.names

    def shape(self, name: str) -> tuple[int, ...]:
        return self.header.tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        label = self.header.tensors[name].format
        if label not in SAFETENSORS_DTYPES:
            raise CheckpointError(f"{self.path}: {name} is stored as {label}, a number format that cannot be read here")
        return SAFETENSORS_DTYPES[label]

    def read(self, name: str) -> Tensor:
        self._file = self._file or self._mapped()
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def _mapped(self) -> Any:
        try:
            return safe_open(self.path, framework="pt", device="cpu").__enter__()
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{self.path} is cut off or is no safetensors file ({error}); fetch or make it again"
            ) from error

    def wanted(self, name: str, device: torch.device) -> Wanted:
        """Where a tensor lies and where it shall be."""
        entry = self.header.tensors[name]
        return Wanted(
            name=name,
            path=self.path,
            start=entry.start,
            num_bytes=entry.num_bytes,
            shape=entry.shape,
            dtype=self.dtype(name),
            device=device,
        )

    def read_all(self, names: Iterable[str], place: Callable[[str], torch.device]) -> Iterator[tuple[str, Tensor]]:
        return _read_in_order(self.wanted(name, place(name)) for name in names)

    def close(self) -> None:
        self._file = None


class PickleSource(TensorSource):
    """An official `.pth`, read with `weights_only` so that it cannot run code."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata = {}
        content = unwrap(_load_pickle(path), path)
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

    def __init__(self, path: Path, shards: tuple[Path, ...]) -> None:
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

    def read_all(self, names: Iterable[str], place: Callable[[str], torch.device]) -> Iterator[tuple[str, Tensor]]:
        return _read_in_order(self._owner[name].wanted(name, place(name)) for name in names)

    def close(self) -> None:
        for source in self._sources:
            source.close()


def open_tensors(path: Path) -> TensorSource:
    """Open a file of named tensors, or the set of shards that `path` belongs to.

    `path` is a `.safetensors` or `.pth` file, any one shard, an `….index.json`, or a folder with exactly one such set.
    Raises `CheckpointError` for a missing, cut off or foreign file and for missing shards.
    """
    located = locate(path)
    if located.is_sharded:
        return ShardedSource(located.path, located.files)
    return (PickleSource if located.is_pickle else SafetensorsSource)(located.path)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a `.safetensors` file, whole or not at all. Raises `OSError` if the disk is full."""
    contiguous = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        try:
            save_file(contiguous, temporary, metadata=dict(metadata) if metadata else None)
        except SafetensorError as error:  # the library wraps the system's own error
            raise OSError(str(error)) from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """As `save_tensors`, with no copy of the tensors in main memory. Raises `OSError` if the disk is full."""
    content: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        content[name] = {"dtype": _FORMATS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    header = json.dumps(content).encode()
    header += b" " * (-len(header) % 8)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for view in host_views(tensors.values()):
            file.write(view)


def _read_in_order(tensors: Iterable[Wanted]) -> Iterator[tuple[str, Tensor]]:
    return read_ahead(sorted(tensors, key=lambda wanted: (wanted.path, wanted.start)))


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
        raise unreadable(path, error) from error
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise broken_pickle(path, error) from error
