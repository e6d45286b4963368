"""Writing files whole or not at all, and telling whether a file has changed."""

import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_EDGE = 1 << 20
_RESERVED = {"con", "prn", "aux", "nul", *(f"com{n}" for n in range(1, 10)), *(f"lpt{n}" for n in range(1, 10))}


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path in the folder of `path`; flush it to disk and rename it when the block ends well.

    A failure, Ctrl-C included, removes the temporary file and leaves whatever stood at `path` untouched. The
    temporary name keeps the suffix, because some writers choose a format by it. The file may be read by whom the
    user lets read his new files; some writers would keep it to the user alone.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.tmp{path.suffix}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 with newlines as they stand, whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What tells one version of a file from another."""

    size: int
    mtime_ns: int
    digest: str


def fingerprint(path: Path) -> Fingerprint:
    """Size, modification time and a digest of the size and the first and last MiB: fast on files of any size."""
    status = path.stat()
    digest = hashlib.blake2b(str(status.st_size).encode(), digest_size=16)
    with path.open("rb") as file:
        digest.update(file.read(_EDGE))
        if status.st_size > _EDGE:
            file.seek(max(_EDGE, status.st_size - _EDGE))
            digest.update(file.read(_EDGE))
    return Fingerprint(size=status.st_size, mtime_ns=status.st_mtime_ns, digest=digest.hexdigest())


def is_portable_name(name: str) -> bool:
    """Whether a file of this name can exist on Windows too."""
    if not name or re.search(r'[<>:"/\\|?*\x00-\x1f]', name) or name[-1] in ". ":
        return False
    return name.split(".")[0].strip().lower() not in _RESERVED
