"""One pass over a clip serves every request, and damage never passes in silence."""

from pathlib import Path

import numpy as np
import pytest

from tests.unit.data.clips import frame_numbers, make_clip, make_picture
from wanlora.data import decoding
from wanlora.data.decoding import FrameRequest, decode
from wanlora.data.probing import probe_video
from wanlora.data.resize import resize_to_cover
from wanlora.foundation.errors import DataError


def request(*indexes: int, size: tuple[int, int] = (64, 48)) -> FrameRequest:
    return FrameRequest(indexes=indexes, width=size[0], height=size[1])


def run(path: Path, *requests: FrameRequest) -> dict[int, np.ndarray]:
    return dict(decode(path, requests, probe_video(path)))


def test_each_request_gets_its_frames(clips: Path) -> None:
    found = run(clips / "a.mp4", request(*range(45)), request(3, 4, 5), request(0, 0, 7, 7))
    assert frame_numbers(found[0]) == list(range(45))
    assert frame_numbers(found[1]) == [3, 4, 5]
    assert frame_numbers(found[2]) == [0, 0, 7, 7]


@pytest.mark.parametrize("name", ["a.mkv", "a.mov"])
def test_other_containers_give_the_same_frames(tmp_path: Path, name: str) -> None:
    assert frame_numbers(run(make_clip(tmp_path / name, 12), request(*range(12)))[0]) == list(range(12))


def test_a_clip_is_decoded_once_for_all_requests_and_no_further_than_needed(clips: Path) -> None:
    passes, frames = decoding.decoded.passes, decoding.decoded.frames
    run(clips / "a.mp4", request(*range(5)), request(0, 10), request(2, size=(32, 16)), request(0, 10, size=(16, 16)))
    assert decoding.decoded.passes - passes == 1
    assert decoding.decoded.frames - frames == 11


def test_requests_are_given_as_soon_as_they_are_complete(clips: Path) -> None:
    path = clips / "a.mp4"
    order = [position for position, _ in decode(path, [request(0, 9), request(1), request(4, 5)], probe_video(path))]
    assert order == [1, 2, 0]


def test_each_size_is_the_frame_resized(clips: Path) -> None:
    found = run(clips / "a.mp4", request(7), request(7, size=(32, 32)))
    assert np.array_equal(found[1][0], resize_to_cover(found[0][0], 32, 32))


@pytest.mark.parametrize(("rotation", "corner"), [(90, "bottom left"), (180, "bottom right"), (-90, "top right")])
def test_rotation_is_applied(tmp_path: Path, rotation: int, corner: str) -> None:
    path = make_clip(tmp_path / "turned.mp4", 3, rotation=rotation)
    info = probe_video(path)
    picture = run(path, request(1, size=info.size))[0][0]
    height, width = picture.shape[:2]
    rows = slice(2, height // 8) if "top" in corner else slice(-height // 8, -2)
    columns = slice(2, width // 8) if "left" in corner else slice(-width // 8, -2)
    assert picture[rows, columns].mean() > 200
    assert picture.mean() < 100


def test_a_file_that_changed_since_it_was_measured_is_found(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "a.mp4", 20)
    info = probe_video(path)
    make_clip(path, 10)
    with pytest.raises(DataError, match=r"a\.mp4 ends after 10 of 20 frames"):
        list(decode(path, [request(*range(20))], info))


def test_a_size_that_changes_is_found(tmp_path: Path) -> None:
    for number, size in enumerate([(64, 48), (64, 48), (32, 48)]):
        make_picture(tmp_path / "frames" / f"{number}.png", size)
    with pytest.raises(DataError, match="frame 2 is 32x48, the clip began as 64x48"):
        run(tmp_path / "frames", request(0, 1, 2))


def test_a_damaged_middle_is_found(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "noisy.mp4", 40, size=(160, 128))
    info = probe_video(path)
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat") + 1200
    data[start : start + 400] = bytes(400)
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match=r"noisy\.mp4"):
        list(decode(path, [request(*range(40))], info))


def test_a_folder_of_frames_is_read_in_order(tmp_path: Path) -> None:
    for number in range(3):
        make_picture(tmp_path / f"{number}.png", level=number * 4)
    assert frame_numbers(run(tmp_path, request(0, 2))[0]) == [0, 2]
