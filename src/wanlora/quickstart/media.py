"""Scenes of the small world as real picture and video files. Nothing random: the same call writes the same pictures."""

from pathlib import Path

from PIL import Image

from wanlora.foundation.files import atomic_path
from wanlora.generation.writing import write_video
from wanlora.quickstart.world import FPS, Scene, film


def write_clip(path: Path, scene: Scene, *, frames: int, fps: int = FPS, width: int = 192, height: int = 128) -> None:
    """Film a scene as h264 (`.mp4`)."""
    write_video(path, film(scene, frames, width, height, fps), fps)


def write_picture(path: Path, scene: Scene, *, width: int = 160, height: int = 160) -> None:
    """Photograph a scene in the format that the suffix names (`.png`, `.jpg`)."""
    with atomic_path(path) as temporary:
        Image.fromarray(film(scene, 1, width, height)[0]).save(temporary, quality=92)
