"""The dataset file: which pictures and clips, at which size, cut how."""

import ntpath
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from wanlora.config.fields import Checked, Count, Limits, Positive, check_fields
from wanlora.foundation.errors import ConfigError
from wanlora.foundation.shapes import floor_to_latent_frames

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


def _check_source(config: DatasetConfig) -> None:
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
        check_fields(self)
        _check_source(self)


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
        check_fields(self)
        _check_source(self)
        floored = tuple(sorted({floor_to_latent_frames(frames) for frames in self.target_frames}))
        if not floored or self.target_frames != floored:
            raise ConfigError(f"{self.where}: target_frames must be rising numbers 4k + 1, got {self.target_frames}")


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetsConfig:
    """A dataset file."""

    path: Path
    """The file."""
    datasets: tuple[DatasetConfig, ...]
    """Its tables, in order."""


def comparable_path(path: str) -> str:
    """Two spellings of one folder become the same text.

    A drive letter or a backslash makes a path a Windows path wherever the file is read: case and kind of slash are
    ignored. Other paths are resolved.
    """
    if os.name != "nt" and (re.match(r"[A-Za-z]:", path) or "\\" in path):
        return ntpath.normpath(path).casefold()
    return os.path.normcase(Path(path).resolve())
