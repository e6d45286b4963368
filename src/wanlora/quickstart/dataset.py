"""A training set of the usual three parts, at the smallest sizes that still show everything.

Pictures; the clips once as short windows at a larger size; the same clips once as long windows at a smaller size. Two
clips are short on purpose, so that the report before caching has something to name: 45 frames hold only one window of
45, 33 frames hold none.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import toml

from wanlora.foundation.files import write_text
from wanlora.quickstart.media import SCENES, write_clip, write_picture

_CLIPS = ((60, 16), (52, 16), (45, 16), (33, 16), (100, 30), (96, 30))
"""Frames and frames per second, one clip for each scene."""
_PICTURES = (
    ("png", 160, 160),
    ("jpg", 160, 160),
    ("png", 192, 128),
    ("jpg", 128, 192),
    ("png", 160, 160),
    ("jpg", 160, 120),
)
"""Format, width and height, one picture for each scene."""

_PROMPTS = f"""\
# one picture, and one short clip
{SCENES[0].caption} --w 96 --h 96 --f 1 --d 7 --s 4
{SCENES[1].caption} --w 96 --h 64 --f 9 --d 7 --s 4
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class TinyDataset:
    """Where the parts of the training set lie."""

    toml: Path
    prompts: Path
    images: Path
    videos: Path

    @property
    def caches(self) -> tuple[Path, ...]:
        """The cache folders, in the order of the TOML's datasets."""
        return (self.images / "cache", self.videos / "cache_1", self.videos / "cache_2")


def make_tiny_dataset(folder: Path) -> TinyDataset:
    """Write pictures, clips, captions, the dataset TOML and sample prompts; files that are there already stay."""
    dataset = TinyDataset(
        toml=folder / "dataset.toml",
        prompts=folder / "prompts.txt",
        images=folder / "images",
        videos=folder / "videos",
    )
    for scene, (frames, fps) in zip(SCENES, _CLIPS, strict=True):
        clip = dataset.videos / f"{scene.name}.mp4"
        if not clip.exists():
            write_clip(clip, scene, frames=frames, fps=fps)
        _write_missing(clip.with_suffix(".txt"), scene.caption)
    for scene, (suffix, width, height) in zip(SCENES, _PICTURES, strict=True):
        picture = dataset.images / f"{scene.name}.{suffix}"
        if not picture.exists():
            write_picture(picture, scene, width=width, height=height)
        _write_missing(picture.with_suffix(".txt"), scene.caption)
    _write_missing(dataset.prompts, _PROMPTS)
    write_text(dataset.toml, toml.dumps(_tables(dataset)))
    return dataset


def _write_missing(path: Path, text: str) -> None:
    if not path.exists():
        write_text(path, text)


def _tables(dataset: TinyDataset) -> dict[str, Any]:
    """The dataset TOML. Folders are absolute, because relative ones are read from wherever a program is started."""
    images, videos = dataset.images.resolve().as_posix(), dataset.videos.resolve().as_posix()
    return {
        "general": {"caption_extension": ".txt", "enable_bucket": True, "bucket_no_upscale": True},
        "datasets": [
            {"image_directory": images, "cache_directory": f"{images}/cache", **_common(96, 96)},
            {
                "video_directory": videos,
                "cache_directory": f"{videos}/cache_1",
                **_common(96, 64),
                "frame_extraction": "head",
                "target_frames": [1, 21],
            },
            {
                "video_directory": videos,
                "cache_directory": f"{videos}/cache_2",
                **_common(64, 48),
                "frame_extraction": "uniform",
                "target_frames": [45],
                "frame_sample": 2,
            },
        ],
    }


def _common(width: int, height: int) -> dict[str, Any]:
    return {"resolution": [width, height], "batch_size": 1, "num_repeats": 1}
