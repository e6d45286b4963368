"""What files of named tensors say of themselves, read without their tensors and without torch.

Which model a file holds, whether a cache file is the one that is wanted: that is in the first kilobytes. Importing
torch takes longer than looking at a thousand files, so whoever needs only this does without it.
Safetensors layout: github.com/huggingface/safetensors.
"""

import json
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from wanlora.foundation.errors import CheckpointError

_SHARD = re.compile(r"^(?P<stem>.*)-(?P<index>\d{5})-of-(?P<count>\d{5})$")
_SAFETENSORS = {".safetensors", ".sft"}
_PICKLES = {".pth", ".pt", ".bin", ".ckpt"}
_WRAPPERS = ("state_dict", "model_state", "module")
_LEGACY_PICKLES = 4
"""Files older than torch 1.6 begin with a magic number, a version and the system; the tensors come fourth."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a safetensors file."""

    format: str
    """The file's word for the number format, as `BF16`."""
    shape: tuple[int, ...]
    start: int
    """The first byte, counted from the beginning of the file."""
    end: int
    """One past the last byte."""

    @property
    def num_bytes(self) -> int:
        """What it takes in the file."""
        return self.end - self.start


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """What a safetensors file holds."""

    path: Path
    tensors: Mapping[str, Entry]
    metadata: Mapping[str, str]

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors, as the file lists them."""
        return tuple(self.tensors)


@dataclass(frozen=True, kw_only=True, slots=True)
class Located:
    """The files that make up one model."""

    path: Path
    """What was named, or the one set in the folder that was named."""
    files: tuple[Path, ...]
    """A pickle, a safetensors file, or the shards."""

    @property
    def is_pickle(self) -> bool:
        """Whether it is an official `.pth`."""
        return self.files[0].suffix.lower() in _PICKLES

    @property
    def is_sharded(self) -> bool:
        """Whether it was named by a shard or an index."""
        return self.path.name.endswith(".index.json") or _SHARD.match(self.path.stem) is not None


def locate(path: Path) -> Located:
    """The files behind `path`: a weights file, any one shard, an `….index.json`, or a folder with exactly one set.

    Raises `CheckpointError` for what is missing and for other kinds of files.
    """
    if path.is_dir():
        path = _only_checkpoint_in(path)
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; check the spelling and the drive")
    if path.name.endswith(".index.json"):
        return Located(path=path, files=_shards_of_index(path))
    if _SHARD.match(path.stem) and path.suffix == ".safetensors":
        return Located(path=path, files=_shards_beside(path))
    if path.suffix.lower() in _PICKLES | _SAFETENSORS:
        return Located(path=path, files=(path,))
    raise CheckpointError(
        f"{path}: weights are read from .safetensors and .pth files, not from {path.suffix or 'this'} files"
    )


def stored_names(path: Path) -> tuple[str, ...]:
    """The names of the tensors behind `path`. Raises `CheckpointError` for a missing, cut off or foreign file."""
    located = locate(path)
    if located.is_pickle:
        return _names_in_pickle(located.files[0])
    return tuple(name for file in located.files for name in read_header(file).names)


def read_header(path: Path) -> Header:
    """The header of a safetensors file, checked against its length. Raises `CheckpointError`."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = path.stat().st_size
            if not 2 <= length <= size - 8:
                raise ValueError(f"its header claims {length} bytes, the file has {size}")
            content: dict[str, Any] = json.loads(file.read(length))
        metadata = content.pop("__metadata__", None) or {}
        tensors = {name: _entry(fields, 8 + length) for name, fields in content.items()}
        end = max((entry.end for entry in tensors.values()), default=0)
        if end > size:
            raise ValueError(f"it should have {end} bytes and has {size}")
        return Header(path=path, tensors=tensors, metadata={str(key): str(value) for key, value in metadata.items()})
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is cut off or is no safetensors file ({error}); fetch or make it again"
        ) from error


def unwrap(content: Any, path: Path) -> dict[Any, Any]:
    """The named tensors in what a pickle holds. Raises `CheckpointError` if it holds something else."""
    for wrapper in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}, not named tensors; pass the model's weights file"
        )
    return content


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """What to say of a file that the system does not open."""
    return CheckpointError(f"{path} cannot be read ({error.strerror or error}); check that you may open it")


def broken_pickle(path: Path, error: Exception) -> CheckpointError:
    """What to say of a pickle that cannot be made out."""
    return CheckpointError(f"{path} is cut off or is no PyTorch weights file ({error}); fetch it again")


def _entry(fields: Mapping[str, Any], data: int) -> Entry:
    start, end = fields["data_offsets"]
    return Entry(str(fields["dtype"]), tuple(map(int, fields["shape"])), data + int(start), data + int(end))


class _Nothing:
    """Stands for every object in a pickle."""

    def __new__(cls, *arguments: Any, **keywords: Any) -> "_Nothing":
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass


class _NamesOnly(pickle.Unpickler):
    """Rebuilds dictionaries and puts `_Nothing` in the place of everything else, so no code of the file can run."""

    def find_class(self, module: str, name: str) -> Any:
        return OrderedDict if (module, name) == ("collections", "OrderedDict") else _Nothing

    def persistent_load(self, identity: Any) -> _Nothing:
        return _Nothing()


def _names_in_pickle(path: Path) -> tuple[str, ...]:
    try:
        with _pickled(path) as (file, count):
            for _ in range(count):
                content = _NamesOnly(file).load()
    except OSError as error:
        raise unreadable(path, error) from error
    except Exception as error:  # a senseless pickle can end in any error at all
        raise broken_pickle(path, error) from error
    return tuple(str(name) for name, value in unwrap(content, path).items() if isinstance(value, _Nothing))


@contextmanager
def _pickled(path: Path) -> Iterator[tuple[IO[bytes], int]]:
    """The pickles of a weights file, and how many there are; the last holds the tensors."""
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            file.seek(0)
            yield file, _LEGACY_PICKLES
            return
        with zipfile.ZipFile(file) as archive:
            inside = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            with archive.open(inside) as member:
                yield member, 1


def _shards_of_index(index: Path) -> tuple[Path, ...]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8-sig"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not an index of shards ({error}); fetch it again") from error
    return _require(index.with_name(name) for name in names)


def _shards_beside(shard: Path) -> tuple[Path, ...]:
    match = _SHARD.match(shard.stem)
    assert match is not None
    count = int(match["count"])
    return _require(
        shard.with_name(f"{match['stem']}-{n:05d}-of-{count:05d}{shard.suffix}") for n in range(1, count + 1)
    )


def _require(shards: Iterator[Path]) -> tuple[Path, ...]:
    listed = tuple(shards)
    missing = [shard for shard in listed if not shard.is_file()]
    if missing:
        names = ", ".join(shard.name for shard in missing)
        raise CheckpointError(
            f"{listed[0].parent}: {len(missing)} of {len(listed)} shards are missing ({names}); fetch them"
        )
    return listed


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
