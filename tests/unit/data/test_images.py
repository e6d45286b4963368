"""Reading pictures upright, in every format, or naming the bad one."""

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.unit.data.clips import make_picture
from wanlora.data.images import image_size, read_image
from wanlora.foundation import log as log_module
from wanlora.foundation.errors import DataError


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".PNG"])
def test_every_format_is_read(tmp_path: Path, suffix: str) -> None:
    path = make_picture(tmp_path / f"a{suffix}")
    picture = read_image(path)
    assert image_size(path) == (64, 48)
    assert picture.shape == (48, 64, 3) and picture.dtype == np.uint8
    assert abs(float(picture[30:, 30:].mean()) - 100) < 2 and picture[4, 4].min() > 240


@pytest.mark.parametrize(("orientation", "size"), [(1, (64, 48)), (3, (64, 48)), (6, (48, 64)), (8, (48, 64))])
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, size: tuple[int, int]) -> None:
    path = make_picture(tmp_path / "plain.jpg")
    with Image.open(path) as image:
        exif = Image.Exif()
        exif[0x0112] = orientation
        image.save(tmp_path / "turned.jpg", exif=exif, quality=100)
    assert image_size(tmp_path / "turned.jpg") == size
    picture = read_image(tmp_path / "turned.jpg")
    assert picture.shape[:2] == (size[1], size[0])
    corners = {1: (4, 4), 3: (-4, -4), 6: (4, -4), 8: (-4, 4)}  # where the white corner belongs
    assert picture[corners[orientation]].min() > 240


def test_transparency_is_dropped_and_mentioned_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(log_module, "_said", set())
    monkeypatch.setattr(log_module.log, "propagate", True)
    for name, alpha in (("opaque.png", 255), ("glass.png", 0)):
        Image.new("RGBA", (16, 16), (10, 20, 30, alpha)).save(tmp_path / name)
    with caplog.at_level(logging.WARNING, logger="wanlora"):
        assert read_image(tmp_path / "opaque.png")[0, 0].tolist() == [10, 20, 30]
        assert not caplog.records
        assert read_image(tmp_path / "glass.png")[0, 0].tolist() == [10, 20, 30]
    assert [record for record in caplog.records if "glass.png" in record.message]


def test_sixteen_bit_grey_is_scaled(tmp_path: Path) -> None:
    Image.fromarray(np.full((16, 16), 0x8000, np.uint16)).save(tmp_path / "deep.png")
    assert read_image(tmp_path / "deep.png")[0, 0].tolist() == [128, 128, 128]


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_a_cut_off_picture_is_named(tmp_path: Path, name: str) -> None:
    path = make_picture(tmp_path / name)
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=f"{name} is cut off or is no picture"):
        read_image(path)


def test_a_text_file_is_no_picture(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("hello", encoding="utf-8")
    with pytest.raises(DataError, match="is no picture"):
        image_size(tmp_path / "a.png")


def test_a_missing_picture_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.png does not exist"):
        read_image(tmp_path / "gone.png")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "avif"])
def test_half_a_picture_is_named(tmp_path: Path, suffix: str, share: float) -> None:
    path = tmp_path / f"a.{suffix}"
    pixels = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(DataError, match=rf"a\.{suffix} is cut off or is no picture"):
        image_size(path)
        read_image(path)
