"""Finding the pictures and clips of a sub-dataset and their captions.

A sub-dataset names a folder (not searched below its first level) or a JSONL file. Caches are keyed by a file's name
without folder and suffix, so two sources that share one in the same cache folder are an error here, not one picture
with the other's caption. Everything that is wrong is reported together; nothing is deleted for being absent.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Literal

from wanlora.config.dataset import DatasetConfig, ImageDatasetConfig, VideoDatasetConfig
from wanlora.foundation.errors import DataError, Problems

Kind = Literal["image", "video"]
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif")
VIDEO_SUFFIXES = (".mp4", ".webm", ".avi", ".mkv", ".mov", ".flv", ".wmv", ".m4v", ".mpg", ".mpeg")
_NAMED = 5
"""How many names a message lists before it says how many more there are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One picture or clip on disk."""

    path: Path
    """A file, or for a clip a folder of frames; it may be absent when caches are trained without their sources."""
    kind: Kind
    caption: str | None = None
    """None when it is not at hand."""

    @property
    def stem(self) -> str:
        """What its cache files are named after."""
        return cache_stem(self.path)


def cache_stem(path: PurePath) -> str:
    """The last part of `path` without its suffix."""
    return path.stem


def kind_of(config: DatasetConfig) -> Kind:
    """What a sub-dataset holds."""
    return "video" if isinstance(config, VideoDatasetConfig) else "image"


def find_sources(config: DatasetConfig, *, captions: bool = True) -> tuple[Source, ...]:
    """Every source of a sub-dataset with its caption, sorted by name in a folder, in file order in a JSONL.

    With `captions` false a missing caption is no error and reads None. Raises `DataError` for a folder that is absent
    or holds nothing, and one error that lists all missing or empty captions.
    """
    if isinstance(config, VideoDatasetConfig):
        folder, rows = config.video_directory, config.video_jsonl_file
    else:
        assert isinstance(config, ImageDatasetConfig)
        folder, rows = config.image_directory, config.image_jsonl_file
    if folder is not None:
        return _in_folder(folder, kind_of(config), config, captions)
    assert rows is not None
    return _in_rows(rows, kind_of(config), config.where)


def require_distinct(placed: Iterable[tuple[Path, Source]]) -> None:
    """Raise `DataError` if two sources would share cache files; `placed` pairs cache folders and sources."""
    owners: dict[tuple[Path, str], Source] = {}
    problems = Problems()
    for folder, source in placed:
        first = owners.setdefault((folder.resolve(), source.stem.casefold()), source)
        if first.path.resolve() != source.path.resolve():
            problems.add(
                f"{first.path} and {source.path} would share the cache files {source.stem}_… in {folder}; "
                "rename one or give it another cache_directory"
            )
        elif None not in (first.caption, source.caption) and first.caption != source.caption:
            problems.add(f"{source.path} is given two captions in {folder}; leave one or use another cache_directory")
    problems.raise_all(DataError)


def some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _in_folder(folder: Path, kind: Kind, config: DatasetConfig, captions: bool) -> tuple[Source, ...]:
    if not folder.is_dir():
        raise DataError(f"{config.where}: {kind}_directory {folder} does not exist; check the spelling and the drive")
    suffixes = IMAGE_SUFFIXES if kind == "image" else VIDEO_SUFFIXES
    paths = [path for path in folder.iterdir() if path.suffix.lower() in suffixes and path.is_file()]
    paths = sorted((path for path in paths if not path.name.startswith(".")), key=lambda path: path.name)
    if not paths:
        raise DataError(
            f"{config.where}: {kind}_directory {folder} holds no {kind} ({', '.join(suffixes)}); existing caches are "
            "left as they are. Check the path; folders below it are not searched"
        )
    problems = Problems()
    sources = [Source(path=path, kind=kind, caption=_caption(path, config, problems)) for path in paths]
    if captions:
        with problems.collect():
            _require_captions(sources, config.caption_extension, config.where)
    problems.raise_all(DataError)
    return tuple(sources)


def _caption(source: Path, config: DatasetConfig, problems: Problems) -> str | None:
    """The caption beside a source; None if there is no file. One that cannot be read becomes a problem."""
    path = source.with_name(source.stem + config.caption_extension)
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        problems.add(str(_unreadable(path, error)))
        return "unreadable"  # neither missing nor empty; the problem is raised once all are read


def _unreadable(path: Path, error: OSError | UnicodeDecodeError) -> DataError:
    if isinstance(error, UnicodeDecodeError):
        return DataError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8")
    return DataError(f"{path} cannot be read ({error.strerror or error}); it must be a text file that may be opened")


def _require_captions(sources: Iterable[Source], extension: str, where: str) -> None:
    problems = Problems()
    listed = list(sources)
    missing = [source.stem + extension for source in listed if source.caption is None]
    empty = [source.stem + extension for source in listed if source.caption == ""]
    folder = listed[0].path.parent
    if missing:
        problems.add(f"{where}: {len(missing)} captions are missing in {folder}: {some(missing)}; write them")
    if empty:
        problems.add(f"{where}: {len(empty)} captions in {folder} are empty: {some(empty)}; write them")
    problems.raise_all(DataError)


def _in_rows(path: Path, kind: Kind, where: str) -> tuple[Source, ...]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError as error:
        raise DataError(f"{where}: {kind}_jsonl_file {path} does not exist; check the spelling") from error
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error
    problems = Problems()
    sources = list(_rows(lines, path, kind, problems))
    problems.raise_all(DataError)
    if not sources:
        raise DataError(f"{where}: {path} holds no rows; existing caches are left as they are")
    return tuple(sources)


def _rows(lines: Iterable[str], path: Path, kind: Kind, problems: Problems) -> Iterator[Source]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            with problems.collect():
                yield _row(line, f"{path}, line {number}", kind)


def _row(line: str, where: str, kind: Kind) -> Source:
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is not JSON ({error}); each line is one object") from error
    if not isinstance(row, dict):
        raise DataError(f"{where} is not a JSON object")
    location = row.get(f"{kind}_path", row.get("image_path_0") if kind == "image" else None)
    caption = row.get("caption")
    if not isinstance(location, str) or not location:
        raise DataError(f"{where} has no {kind}_path")
    if not isinstance(caption, str) or not caption.strip():
        raise DataError(f"{where} has no caption")
    return Source(path=Path(location), kind=kind, caption=caption.strip())
