"""A training set of the usual three parts, at the smallest sizes that still show everything.

Pictures; the clips once as short windows at a larger size; the same clips once as long windows at a smaller size. All
show the new look and the new motion under the trigger words; other scenes of the same kind are for validation. Two
clips are short on purpose, so that the report before caching has something to name: 45 frames hold only one window of
45, 33 frames hold none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import toml

from wanlora.foundation.files import write_text
from wanlora.quickstart.media import write_clip, write_picture
from wanlora.quickstart.world import NEW_MOTION, NEW_STYLE, Scene, new_scenes

_CLIPS = ((60, 16), (52, 16), (45, 16), (33, 16), (100, 30), (96, 30), *[(60, 16)] * 12)
"""Frames and frames per second of each clip."""
_PICTURES = (("png", 160, 160), ("jpg", 160, 160), ("png", 192, 128), ("jpg", 128, 192)) * 3
"""Format, width and height of each picture."""
_UNSEEN_CLIPS = ((21, 16),) * 4
_UNSEEN_PICTURES = (("png", 160, 160),) * 4

_SEEDS = {"videos": 1, "images": 2, "unseen_videos": 3, "unseen_images": 4}
_SAMPLING = "--s 16 --fs 3 --l 1"
"""Solver steps, shift and guidance."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """Something to draw."""

    scene: Scene
    width: int
    height: int
    frames: int
    seed: int

    @property
    def line(self) -> str:
        """What stands in the prompt file."""
        size = f"--w {self.width} --h {self.height} --f {self.frames}"
        return f"{self.scene.caption} {size} --d {self.seed} {_SAMPLING}"


def _new(shape: str, colour: str, size: str) -> Scene:
    return Scene(shape=shape, colour=colour, size=size, motion=NEW_MOTION, style=NEW_STYLE)


PROMPTS = (
    Prompt(scene=_new("circle", "red", "large"), width=96, height=64, frames=21, seed=1),
    Prompt(scene=_new("cross", "cyan", "large"), width=96, height=64, frames=21, seed=2),
    Prompt(scene=_new("square", "yellow", "large"), width=96, height=64, frames=21, seed=3),
    Prompt(scene=_new("triangle", "white", "small"), width=96, height=64, frames=21, seed=6),
    Prompt(scene=_new("triangle", "green", "large"), width=64, height=48, frames=45, seed=4),
    Prompt(scene=_new("circle", "pink", "large"), width=96, height=96, frames=1, seed=5),
)
"""What is drawn, before and after."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TinyDataset:
    """Where the parts of the training set lie."""

    folder: Path

    @property
    def toml(self) -> Path:
        """The dataset file."""
        return self.folder / "dataset.toml"

    @property
    def prompts(self) -> Path:
        """All prompts."""
        return self.folder / "prompts.txt"

    @property
    def previews(self) -> Path:
        """A clip and a picture, for samples while training."""
        return self.folder / "previews.txt"

    @property
    def images(self) -> Path:
        """Pictures with their captions."""
        return self.folder / "images"

    @property
    def videos(self) -> Path:
        """Clips with their captions."""
        return self.folder / "videos"

    @property
    def caches(self) -> tuple[Path, ...]:
        """The cache folders, in the order of the TOML's tables."""
        trained = (self.images / "cache", self.videos / "cache_1", self.videos / "cache_2")
        return (*trained, self.folder / "unseen_images" / "cache", self.folder / "unseen_videos" / "cache")


def make_tiny_dataset(folder: Path) -> TinyDataset:
    """Write pictures, clips, captions, the dataset TOML and sample prompts; files that are there already stay."""
    dataset = TinyDataset(folder=folder)
    _write_clips(dataset.videos, _CLIPS)
    _write_pictures(dataset.images, _PICTURES)
    _write_clips(folder / "unseen_videos", _UNSEEN_CLIPS)
    _write_pictures(folder / "unseen_images", _UNSEEN_PICTURES)
    _write_missing(dataset.prompts, _prompt_file("what the page of the quickstart compares", PROMPTS))
    _write_missing(dataset.previews, _prompt_file("one clip and one picture", (PROMPTS[0], PROMPTS[-1])))
    write_text(dataset.toml, toml.dumps(_tables(folder)))
    return dataset


def _write_clips(folder: Path, clips: Sequence[tuple[int, int]]) -> None:
    for number, (scene, (frames, fps)) in enumerate(zip(_scenes(folder, len(clips)), clips, strict=True), 1):
        clip = folder / f"scene_{number:02d}.mp4"
        if not clip.exists():
            write_clip(clip, scene, frames=frames, fps=fps)
        _write_missing(clip.with_suffix(".txt"), scene.caption)


def _write_pictures(folder: Path, pictures: Sequence[tuple[str, int, int]]) -> None:
    scenes = _scenes(folder, len(pictures))
    for number, (scene, (suffix, width, height)) in enumerate(zip(scenes, pictures, strict=True), 1):
        picture = folder / f"scene_{number:02d}.{suffix}"
        if not picture.exists():
            write_picture(picture, scene, width=width, height=height)
        _write_missing(picture.with_suffix(".txt"), scene.caption)


def _scenes(folder: Path, count: int) -> tuple[Scene, ...]:
    return new_scenes(count, _SEEDS[folder.name])


def _prompt_file(title: str, prompts: Sequence[Prompt]) -> str:
    return "\n".join([f"# {title}", *(prompt.line for prompt in prompts), ""])


def _write_missing(path: Path, text: str) -> None:
    if not path.exists():
        write_text(path, text)


def _tables(folder: Path) -> dict[str, Any]:
    """The dataset TOML. Folders are absolute, because relative ones are read from wherever a program is started."""
    return {
        "general": {"caption_extension": ".txt", "enable_bucket": True, "bucket_no_upscale": True, "batch_size": 16},
        "datasets": [
            {**_table(folder, "image", "images", "cache", (96, 96)), "num_repeats": 4},
            {
                **_table(folder, "video", "videos", "cache_1", (96, 64)),
                "frame_extraction": "head",
                "target_frames": [1, 21],
                "num_repeats": 8,
            },
            {
                **_table(folder, "video", "videos", "cache_2", (64, 48)),
                "frame_extraction": "uniform",
                "target_frames": [45],
                "frame_sample": 2,
                "num_repeats": 9,
            },
        ],
        "validation": [
            _table(folder, "image", "unseen_images", "cache", (96, 96)),
            {**_table(folder, "video", "unseen_videos", "cache", (96, 64)), "target_frames": [21]},
        ],
    }


def _table(folder: Path, kind: str, name: str, cache: str, resolution: tuple[int, int]) -> dict[str, Any]:
    source = (folder / name).resolve().as_posix()
    return {
        f"{kind}_directory": source,
        "cache_directory": f"{source}/{cache}",
        "resolution": list(resolution),
    }
