"""Clips that several tests read; none of them writes to these."""

from pathlib import Path

import pytest

from tests.unit.data.clips import make_clip, make_picture, write_caption


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`a.mp4` 45 frames and `b.mp4` 21 frames at 16 fps, `c.mp4` 30 frames at 30 fps, each with a caption."""
    folder = tmp_path_factory.mktemp("clips")
    for name, frames, rate in (("a", 45, 16), ("b", 21, 16), ("c", 30, 30)):
        write_caption(make_clip(folder / f"{name}.mp4", frames, rate), f"clip {name}")
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures with captions."""
    folder = tmp_path_factory.mktemp("pictures")
    for name in ("p.png", "q.jpg", "r.webp"):
        write_caption(make_picture(folder / name), f"picture {name}")
    return folder
