"""What is known of the sources, kept beside the caches in `wanlora_index.json`.

Measuring a thousand clips means reading every packet of them. The index remembers the result under a file's name, size
and time, so that a rerun opens only what has changed, and so that training can be planned where the sources are not.
"""

import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from wanlora.data.info import VideoInfo
from wanlora.data.sources import Kind, Source
from wanlora.foundation.errors import DataError
from wanlora.foundation.files import write_text
from wanlora.foundation.log import warn_once

INDEX_NAME = "wanlora_index.json"
_FORMAT = 1
_THREADS = 4
_KEYS = {"kind", "size", "mtime_ns", "width", "height", "rate", "times"}


class SourceIndex:
    """The measurements kept in one cache folder."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / INDEX_NAME
        self.entries = _read(self.path)
        self.changed = False

    def find(self, source: Source) -> VideoInfo | None:
        """What is known of a source: by name, size and time if it is there, by name alone if it is absent."""
        entry = self.entries.get(source.path.name)
        if entry is None or entry["kind"] != source.kind or source.path.is_dir():
            return None
        if source.path.exists() and [entry["size"], entry["mtime_ns"]] != _size_and_time(source.path):
            return None
        return VideoInfo(
            width=entry["width"], height=entry["height"], times=tuple(entry["times"]), rate=float(entry["rate"])
        )

    def remember(self, source: Source, info: VideoInfo) -> None:
        """Keep what was measured."""
        size, mtime_ns = _size_and_time(source.path)
        self.entries[source.path.name] = {
            "kind": source.kind,
            "size": size,
            "mtime_ns": mtime_ns,
            "width": info.width,
            "height": info.height,
            "rate": info.rate,
            "times": list(info.times),
        }
        self.changed = True

    def keep_only(self, sources: Iterable[Source]) -> None:
        """Forget the sources that are no longer in the dataset."""
        names = {source.path.name for source in sources}
        for name in self.entries.keys() - names:
            del self.entries[name]
            self.changed = True

    def absent_sources(self, kind: Kind, folder: Path) -> tuple[Source, ...]:
        """The sources of `kind` that were in `folder` when it was last seen, by name, without captions."""
        names = sorted(name for name, entry in self.entries.items() if entry["kind"] == kind)
        return tuple(Source(path=folder / name, kind=kind) for name in names)

    def save(self) -> None:
        """Write the index if it has changed; a folder that cannot be written is no error, the next run measures."""
        if not self.changed:
            return
        lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(self.entries[name])}" for name in sorted(self.entries))
        try:
            write_text(self.path, f'{{"format": {_FORMAT}, "sources": {{\n{lines}\n}}}}\n')
        except OSError as error:
            warn_once(f"{self.path} could not be written ({error}); the sources will be measured again next time")
        self.changed = False


def measure(sources: Sequence[Source], index: SourceIndex) -> list[VideoInfo | DataError | None]:
    """The measurements of `sources`, from the index where it knows them.

    A source that cannot be read gives its error; one that is absent and unknown gives None.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(lambda source: _measure(source, index), sources))


def _measure(source: Source, index: SourceIndex) -> VideoInfo | DataError | None:
    known = index.find(source)
    if known is not None:
        return known
    if not source.path.exists():
        return None
    from wanlora.data.probing import probe  # brings the decoders, which a rerun does without

    try:
        info = probe(source)
    except DataError as error:
        return error
    index.remember(source, info)
    return info


def _size_and_time(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        entries: dict[str, dict[str, Any]] = content["sources"] if content["format"] == _FORMAT else {}
        return {name: entry for name, entry in entries.items() if entry.keys() >= _KEYS}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warn_once(f"{path} cannot be read ({error}); the sources are measured again")
        return {}
