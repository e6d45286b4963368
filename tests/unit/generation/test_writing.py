"""Files that previews become."""

from datetime import datetime
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from wanlora.foundation.errors import DataError
from wanlora.generation.pipeline import Frames
from wanlora.generation.writing import preview_path, write_frames, write_image, write_video

COLOURS = ((220, 30, 40), (30, 200, 60), (40, 60, 220), (255, 255, 255), (0, 0, 0), (128, 128, 128))
WHEN = datetime(2026, 1, 2, 3, 4, 5)


def _stripes(num_frames: int) -> Frames:
    """Six colours side by side, each sixteen wide; the whole brightens from frame to frame."""
    frames = np.zeros((num_frames, 64, 96, 3), np.uint8)
    for index, colour in enumerate(COLOURS):
        frames[:, :, index * 16 : (index + 1) * 16] = colour
    for number in range(num_frames):
        frames[number, :16] = 200 * number // num_frames
    return frames


def test_a_clip_reads_back_with_rate_length_size_and_colours(tmp_path: Path) -> None:
    path, frames = tmp_path / "clip.mp4", _stripes(9)
    write_video(path, frames, recipe="Frau am Strand, größer --d 7")
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == 16
        assert stream.duration * stream.time_base == Fraction(9, 16)
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert container.metadata["comment"] == "Frau am Strand, größer --d 7"
        read = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert len(read) == 9
    assert read[0].shape == (64, 96, 3)
    for index, colour in enumerate(COLOURS):
        assert np.abs(read[4][40, index * 16 + 8].astype(int) - colour).max() <= 6, colour
    for number, picture in enumerate(read):
        assert abs(int(picture[8].mean()) - 200 * number // 9) <= 4


def test_another_rate_is_kept(tmp_path: Path) -> None:
    write_video(tmp_path / "clip.mp4", _stripes(5), fps=24)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert container.streams.video[0].average_rate == 24


def test_the_header_comes_first(tmp_path: Path) -> None:
    write_video(tmp_path / "clip.mp4", _stripes(5))
    data = (tmp_path / "clip.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


def test_a_picture_reads_back_exactly(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    write_image(tmp_path / "one.png", picture, recipe="日本 --d 3")
    with Image.open(tmp_path / "one.png") as image:
        assert image.info["comment"] == "日本 --d 3"
        assert np.array_equal(np.asarray(image), picture)


def test_the_suffix_chooses_the_format(tmp_path: Path) -> None:
    write_frames(tmp_path / "one.png", _stripes(1))
    write_frames(tmp_path / "many.mp4", _stripes(5))
    with Image.open(tmp_path / "one.png") as image:
        assert image.size == (96, 64)
    with av.open(str(tmp_path / "many.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 5


def test_a_clip_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"old")
    frames = _stripes(5).astype(np.float64)
    with pytest.raises(ValueError, match=r"float64|dtype"):
        write_video(path, frames)  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_odd_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="95x64"):
        write_video(tmp_path / "clip.mp4", _stripes(5)[:, :, :95])


def test_names_are_those_that_musubi_gives() -> None:
    by_epoch = preview_path(Path("out"), "style", index=1, seed=7, when=WHEN, num_frames=45, step=120, epoch=3)
    assert by_epoch == Path("out/sample/style_e000003_01_20260102030405_7.mp4")
    by_step = preview_path(Path("out"), "style", index=0, seed=7, when=WHEN, num_frames=1, step=120)
    assert by_step == Path("out/sample/style_000120_00_20260102030405_7.png")
