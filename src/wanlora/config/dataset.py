"""The dataset file: which pictures and clips, at which size, cut how.

`read_datasets` reads it strictly: an unknown key, a wrong type or an impossible value is an error that names file, line
and table, and all of a file's errors are reported at once. `[general]` gives defaults to every `[[datasets]]` and every
`[[validation]]`; the configs that come out have it merged in. Whatever is changed on the way (frames floored to 4k + 1)
is said.
"""

import ntpath
import os
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from wanlora.config.fields import Checked, check_fields, settings_of
from wanlora.config.kinds import Count, Kind, Limits, Positive
from wanlora.config.musubi import ANSWERED_KEYS
from wanlora.config.toml import TableFile, read_table
from wanlora.foundation.errors import ConfigError, Problems, did_you_mean, nearest
from wanlora.foundation.log import say_once
from wanlora.foundation.shapes import floor_to_latent_frames, floor_to_size_step

Side = Annotated[int, Limits(low=32)]


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetConfig(Checked):
    """What pictures and clips have in common."""

    where: str
    """The place in the file, for messages: `style.toml: [[datasets]] 2`."""
    resolution: tuple[Side, Side] = (960, 544)
    """Width and height, or one number for both. With buckets: their area."""
    caption_extension: str = ".txt"
    """Ending of the caption files beside pictures and clips."""
    batch_size: Count = 1
    """Samples per batch."""
    num_repeats: Count = 1
    """How often an epoch shows each sample."""
    enable_bucket: bool = False
    """Keep aspect ratios: several sizes of about the same area instead of one."""
    bucket_no_upscale: bool = False
    """Never enlarge; smaller pictures and clips keep their size (needs enable_bucket)."""
    cache_directory: Path
    """Folder of the cache files; each table needs its own. Default: the folder of the pictures or clips."""

    @property
    def source(self) -> Path:
        """The folder or the JSONL file."""
        paths = [getattr(self, key) for key in source_keys(type(self))]
        return next(path for path in paths if path is not None)


def source_keys(cls: type[DatasetConfig]) -> tuple[str, str]:
    """The two keys that say where the items of a kind of dataset come from."""
    medium = "image" if cls is ImageDatasetConfig else "video"
    return f"{medium}_directory", f"{medium}_jsonl_file"


def _check_dataset(config: DatasetConfig) -> None:
    check_fields(config)
    if "." not in config.caption_extension:
        raise ConfigError(f"{config.where}: caption_extension needs its dot, got {config.caption_extension!r}")
    directory, jsonl = source_keys(type(config))
    given = [key for key in (directory, jsonl) if getattr(config, key) is not None]
    if len(given) != 1:
        raise ConfigError(f"{config.where}: give one of {directory} and {jsonl}, not {'both' if given else 'none'}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageDatasetConfig(DatasetConfig):
    """`[[datasets]]` of pictures."""

    image_directory: Path | None = None
    """Folder of pictures with a caption file each."""
    image_jsonl_file: Path | None = None
    """File with one {"image_path": ..., "caption": ...} a line."""

    def __post_init__(self) -> None:
        _check_dataset(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoDatasetConfig(DatasetConfig):
    """`[[datasets]]` of clips."""

    video_directory: Path | None = None
    """Folder of clips with a caption file each."""
    video_jsonl_file: Path | None = None
    """File with one {"video_path": ..., "caption": ...} a line."""
    target_frames: tuple[Count, ...] = (1,)
    """Lengths of the windows that are cut from a clip; each is lowered to 4k + 1."""
    frame_extraction: Literal["head", "chunk", "slide", "uniform", "full"] = "head"
    """Where windows lie: at the start; end to end; every frame_stride frames; frame_sample of them; the whole clip."""
    frame_stride: Count = 1
    """slide: frames from one window to the next."""
    frame_sample: Count = 1
    """uniform: how many windows, spread over the clip."""
    max_frames: Count = 129
    """full: the most frames that are taken."""
    source_fps: Positive | None = None
    """Frames per second of the clips. Default: what each file says."""
    target_fps: Positive | Literal["keep"] | None = None
    """Frames per second to train at; "keep" takes a clip frame by frame. Default: the model's rate."""

    def __post_init__(self) -> None:
        _check_dataset(self)
        floored = tuple(sorted({floor_to_latent_frames(frames) for frames in self.target_frames}))
        if not floored or self.target_frames != floored:
            raise ConfigError(f"{self.where}: target_frames must be rising numbers 4k + 1, got {self.target_frames}")


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetsConfig:
    """A dataset file."""

    path: Path
    """The file."""
    datasets: tuple[DatasetConfig, ...]
    """What is trained, in order."""
    validation: tuple[DatasetConfig, ...] = ()
    """What is never trained on: the loss on it is measured now and then."""


def comparable_path(path: str) -> str:
    """Two spellings of one folder become the same text.

    A drive letter or a backslash makes a path a Windows path wherever the file is read: case and kind of slash are
    ignored. Other paths are resolved.
    """
    if os.name != "nt" and (re.match(r"[A-Za-z]:", path) or "\\" in path):
        return ntpath.normpath(path).casefold()
    return os.path.normcase(Path(path).resolve())


GENERAL_KEYS = ("resolution", "caption_extension", "batch_size", "num_repeats", "enable_bucket", "bucket_no_upscale")
"""Keys that `[general]` may hold."""
_TABLES = ("general", "datasets", "validation")
_KINDS: tuple[type[DatasetConfig], ...] = (ImageDatasetConfig, VideoDatasetConfig)
_SOURCES = tuple(key for cls in _KINDS for key in source_keys(cls))
_EXTRACTION_KEYS = {"frame_stride": "slide", "frame_sample": "uniform", "max_frames": "full"}
"""Keys that only one frame_extraction reads."""


def dataset_kinds(cls: type[DatasetConfig]) -> dict[str, Kind]:
    """The TOML keys of a kind of dataset."""
    return {setting.name: setting.kind for setting in settings_of(cls) if setting.name != "where"}


def read_datasets(path: Path) -> DatasetsConfig:
    """A dataset TOML (or JSON) file. Raises `ConfigError` listing everything that is wrong with it."""
    file = read_table(path)
    problems = Problems()
    _check_top_level(file, problems)
    general = _Table(file, "general", 1, file.data.get("general", {}), problems)
    general_kinds = {key: dataset_kinds(ImageDatasetConfig)[key] for key in GENERAL_KEYS}
    defaults = general.read(general_kinds) if isinstance(general.entry, dict) else {}
    trained = _read_tables(file, "datasets", defaults, problems)
    validation = _read_tables(file, "validation", {**defaults, "num_repeats": 1}, problems)
    _check_cache_directories((*trained, *validation), problems)
    problems.raise_all()
    return DatasetsConfig(path=path, datasets=trained, validation=validation)


def _check_top_level(file: TableFile, problems: Problems) -> None:
    known = {*dataset_kinds(ImageDatasetConfig), *dataset_kinds(VideoDatasetConfig), *ANSWERED_KEYS}
    for key in [key for key in file.data if key not in _TABLES]:
        belongs = "[general] or [[datasets]]" if key in GENERAL_KEYS else "[[datasets]]"
        what = f"belongs in {belongs}" if key in known else "unknown" + did_you_mean(key, _TABLES)
        problems.add(f"{file.where(key)}: {key}: {what}")
    if not isinstance(file.data.get("general", {}), dict):
        problems.add(f"{file.path.name}: write [general] with single brackets; there is one")
    if file.data.get("datasets", []) == []:
        problems.add(f"{file.path.name}: there is no [[datasets]]; add one for each folder of pictures or clips")


def _read_tables(file: TableFile, name: str, defaults: dict[str, Any], problems: Problems) -> tuple[DatasetConfig, ...]:
    """Every `[[name]]` in which nothing is wrong; what is wrong with the others is added."""
    entries = file.data.get(name, [])
    if isinstance(entries, dict):
        problems.add(f"{file.path.name}: write [[{name}]] with double brackets; there may be several")
        return ()
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        problems.add(f"{file.path.name}: {name} must be tables, each under [[{name}]]")
        return ()
    tables = [_Table(file, name, number, entry, problems) for number, entry in enumerate(entries, 1)]
    found = [_dataset(table, defaults) for table in tables]
    return tuple(dataset for dataset in found if dataset is not None)


@dataclass(frozen=True, slots=True)
class _Table:
    """One table of the file while it is read."""

    file: TableFile
    name: str
    number: int
    entry: dict[str, Any]
    problems: Problems

    @property
    def title(self) -> str:
        return "[general]" if self.name == "general" else f"[[{self.name}]] {self.number}"

    @property
    def where(self) -> str:
        return f"{self.file.path.name}: {self.title}"

    @property
    def sources(self) -> list[str]:
        return [key for key in _SOURCES if key in self.entry]

    def place(self, key: str) -> str:
        return f"{self.file.where(key, self.name, self.number)}: {self.title}: {key}"

    def read(self, kinds: dict[str, Kind]) -> dict[str, Any]:
        """The values of the keys in `kinds`, typed; every other key is a problem or answered."""
        values: dict[str, Any] = {}
        for key, value in self.entry.items():
            if key == "num_repeats" and self.name == "validation":
                self.problems.add(f"{self.place(key)} has no meaning here: every sample is measured once; remove it")
            elif key in kinds:
                try:
                    values[key] = kinds[key].from_value([value] * 2 if _is_side(key, value) else value)
                except ValueError as error:
                    self.problems.add(f"{self.place(key)} {error}")
            elif key in ANSWERED_KEYS and not ANSWERED_KEYS[key].refused:
                say_once(f"{self.place(key)}: {ANSWERED_KEYS[key].sentence}")
            else:
                self.problems.add(f"{self.place(key)}: {self._explain(key, kinds)}")
        return values

    def _explain(self, key: str, kinds: dict[str, Kind]) -> str:
        if key in ANSWERED_KEYS:
            return ANSWERED_KEYS[key].sentence
        images, videos = dataset_kinds(ImageDatasetConfig), dataset_kinds(VideoDatasetConfig)
        if key in images or key in videos:
            if self.name == "general":
                return "belongs in [[datasets]], not in [general]"
            return f"is a key of {_home(key)}, and this table has {self.sources[0]}"
        near = nearest(key, kinds) or nearest(key, (*images, *videos))
        if near is None:
            return "unknown key"
        return f"unknown key (did you mean {near!r}{'' if near in kinds else f', a key of {_home(near)}'}?)"


def _home(key: str) -> str:
    """Where a key that is out of place belongs."""
    images, videos = dataset_kinds(ImageDatasetConfig), dataset_kinds(VideoDatasetConfig)
    if key in images and key in videos:
        return "[[datasets]]"
    return "video datasets" if key in videos else "image datasets"


def _is_side(key: str, value: Any) -> bool:
    return key == "resolution" and isinstance(value, int) and not isinstance(value, bool)


def _dataset(table: _Table, defaults: dict[str, Any]) -> DatasetConfig | None:
    """The config of one table, or None if it has problems (which are added)."""
    before = len(table.problems.messages)
    found = [cls for cls in _KINDS if any(key in table.entry for key in source_keys(cls))]
    if len(found) != 1:
        what = f"has {' and '.join(table.sources)}" if found else "has no source"
        cure = f"give pictures and clips a [[{table.name}]] each" if found else f"give one of {', '.join(_SOURCES)}"
        table.problems.add(f"{table.where}: {what}; {cure}")
        table.read({**dataset_kinds(ImageDatasetConfig), **dataset_kinds(VideoDatasetConfig)})
        return None
    cls = found[0]
    given = table.read(dataset_kinds(cls))
    directory, jsonl = source_keys(cls)
    values = {**defaults, **given}
    if directory in given:
        values.setdefault("cache_directory", given[directory])
        if "caption_extension" not in values:
            say_once(f"{table.file.path.name}: no caption_extension given; captions are read from .txt files")
    elif jsonl in given and "cache_directory" not in table.entry:
        table.problems.add(f"{table.where}: {jsonl} needs a cache_directory")
    if len(table.problems.messages) > before:
        return None
    with table.problems.collect():
        values = _settled(values, given, table.where, cls)
        return cls(where=table.where, **values)
    return None


def _settled(values: dict[str, Any], given: dict[str, Any], where: str, cls: type[DatasetConfig]) -> dict[str, Any]:
    """`values` with what the model's grid asks for; every change and every key without effect is said."""
    settled = dict(values)
    if not settled.get("enable_bucket", False):
        settled["resolution"] = _floored_resolution(values.get("resolution", (960, 544)), where)
        if settled.get("bucket_no_upscale"):
            say_once(f"{where}: bucket_no_upscale changes nothing without enable_bucket = true")
    return _settled_frames(settled, given, where) if cls is VideoDatasetConfig else settled


def _floored_resolution(resolution: tuple[int, int], where: str) -> tuple[int, int]:
    width, height = (floor_to_size_step(side) for side in resolution)
    if (width, height) != resolution:
        old = "x".join(map(str, resolution))
        say_once(f"{where}: resolution {old} becomes {width}x{height}: sides must be multiples of 16")
    return width, height


def _settled_frames(values: dict[str, Any], given: dict[str, Any], where: str) -> dict[str, Any]:
    settled = dict(values)
    extraction = values.get("frame_extraction", "head")
    for key, reader in _EXTRACTION_KEYS.items():
        if key in given and extraction != reader:
            say_once(f"{where}: {key} changes nothing with frame_extraction = {extraction!r}; {reader!r} reads it")
    if extraction == "full":
        if "target_frames" in given:
            say_once(f"{where}: target_frames changes nothing with frame_extraction = 'full'; max_frames limits it")
            del settled["target_frames"]
        return settled
    if extraction == "uniform" and values.get("frame_sample", 1) == 1:
        say_once(f"{where}: frame_extraction = 'uniform' with one frame_sample is the same as 'head'")
        settled["frame_extraction"] = "head"
    if "target_frames" not in given:
        say_once(f"{where}: no target_frames given; one frame of each clip is used")
        return settled
    if not values["target_frames"]:
        raise ConfigError(f"{where}: target_frames must name at least one length")
    settled["target_frames"] = tuple(sorted({floor_to_latent_frames(frames) for frames in values["target_frames"]}))
    if settled["target_frames"] != values["target_frames"]:
        old, new = list(values["target_frames"]), list(settled["target_frames"])
        say_once(f"{where}: target_frames {old} becomes {new}: lengths are 4k + 1, each once, rising")
    return settled


def _check_cache_directories(datasets: tuple[DatasetConfig, ...], problems: Problems) -> None:
    users: dict[str, list[DatasetConfig]] = defaultdict(list)
    for dataset in datasets:
        users[comparable_path(str(dataset.cache_directory))].append(dataset)
    for sharing in users.values():
        if len(sharing) > 1:
            tables = " and ".join(dataset.where.partition(": ")[2] for dataset in sharing)
            file = sharing[0].where.partition(": ")[0]
            problems.add(f"{file}: {tables} share the cache_directory {sharing[0].cache_directory}; give each its own")
