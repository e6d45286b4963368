"""Measuring real files: counts, times and sizes as a player sees them, and every way a file can be bad."""

import wave
from pathlib import Path

import av
import numpy as np
import pytest

from tests.unit.data.clips import make_clip, make_picture
from wanlora.data.probing import frame_files, probe_video
from wanlora.foundation.errors import DataError

FORMATS = [
    ("a.mp4", "libx264"),
    ("a.mkv", "libx264"),
    ("a.mov", "libx264"),
    ("a.webm", "libvpx-vp9"),
    ("a.avi", "mpeg4"),
    ("b.avi", "libx264"),
    ("a.mpg", "mpeg1video"),
]


@pytest.mark.parametrize(("name", "codec"), FORMATS)
def test_every_container_gives_count_rate_and_size(tmp_path: Path, name: str, codec: str) -> None:
    rate = 25 if codec == "mpeg1video" else 16
    info = probe_video(make_clip(tmp_path / name, 21, rate, codec=codec))
    assert (info.num_frames, info.size) == (21, (64, 48))
    assert info.rate == pytest.approx(rate, rel=1e-3)
    assert np.allclose(info.times, np.arange(21) / rate, atol=0.0011)  # Matroska rounds to milliseconds
    assert info.duration == pytest.approx(21 / rate, abs=0.002)


def test_a_variable_rate_gives_its_own_times(tmp_path: Path) -> None:
    milliseconds = [0, 40, 100, 400, 440, 1000]
    info = probe_video(make_clip(tmp_path / "vfr.mkv", 6, milliseconds=milliseconds))
    assert np.allclose(info.times, np.array(milliseconds) / 1000, atol=0.0011)
    assert info.rate == pytest.approx(5.0, rel=0.01)


@pytest.mark.parametrize(("rotation", "size"), [(90, (48, 64)), (-90, (48, 64)), (180, (64, 48))])
def test_the_size_is_the_one_shown(tmp_path: Path, rotation: int, size: tuple[int, int]) -> None:
    assert probe_video(make_clip(tmp_path / "turned.mp4", 3, rotation=rotation)).size == size


def test_vp8_packets_that_are_never_shown_are_not_counted(tmp_path: Path) -> None:
    plain, hidden = make_clip(tmp_path / "plain.webm", 9, codec="libvpx"), tmp_path / "hidden.webm"
    with av.open(str(plain)) as source, av.open(str(hidden), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for index, packet in enumerate(packet for packet in source.demux(video=0) if packet.size):
            data = bytearray(bytes(packet))
            data[0] &= 0xEF if index == 4 else 0xFF
            copy = av.Packet(bytes(data))
            copy.pts, copy.dts, copy.time_base, copy.stream = packet.pts, packet.dts, packet.time_base, stream
            copy.is_keyframe = packet.is_keyframe
            target.mux(copy)
    assert probe_video(plain).num_frames == 9
    with av.open(str(hidden)) as container:
        shown = sum(1 for _ in container.decode(video=0))
    assert probe_video(hidden).num_frames == shown == 8


def cut_file(path: Path, share: float) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def test_a_fast_start_file_that_ends_early_is_found(tmp_path: Path) -> None:
    whole = make_clip(tmp_path / "whole.mp4", 40)
    moved = tmp_path / "faststart.mp4"
    moved.write_bytes(with_index_first(whole))
    assert probe_video(moved).num_frames == 40
    with pytest.raises(DataError, match=r"faststart\.mp4.*(cut off|damaged)"):
        probe_video(cut_file(moved, 0.8))


def with_index_first(path: Path) -> bytes:
    """The file with its index in front, as streaming sites store it."""
    out = path.with_name("moved.mp4")
    with av.open(str(path)) as source, av.open(str(out), "w", options={"movflags": "+faststart"}) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    return out.read_bytes()


def test_a_matroska_file_that_ends_early_is_found(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.mkv.*(cut off|damaged)"):
        probe_video(cut_file(make_clip(tmp_path / "a.mkv", 40), 0.6))


def test_an_mp4_without_its_index_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.mp4 is damaged, was not completely written"):
        probe_video(cut_file(make_clip(tmp_path / "a.mp4", 20), 0.5))


@pytest.mark.parametrize("content", [b"", b"not a video, only words\n" * 40])
def test_an_empty_or_foreign_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "odd.mp4"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"odd\.mp4 is damaged.*replace it or take it out"):
        probe_video(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.mp4 does not exist"):
        probe_video(tmp_path / "gone.mp4")


def test_sound_alone_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "sound.avi"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(b"\0\0" * 800)
    with pytest.raises(DataError, match="holds no video, only sound"):
        probe_video(path)


def test_a_folder_of_frames_is_a_clip_in_the_order_of_its_numbers(tmp_path: Path) -> None:
    for number in (10, 2, 1):
        make_picture(tmp_path / "frames" / f"f{number}.png")
    (tmp_path / "frames" / "note.txt").write_text("x", encoding="utf-8")
    assert [path.name for path in frame_files(tmp_path / "frames")] == ["f1.png", "f2.png", "f10.png"]
    info = probe_video(tmp_path / "frames")
    assert (info.num_frames, info.size) == (3, (64, 48))


def test_a_folder_without_pictures_is_no_clip(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no pictures"):
        probe_video(tmp_path)


def test_a_title_that_is_not_utf8_is_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "Caffee"
        stream = container.add_stream("libx264", rate=16)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(5):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode(None))
    content = path.read_bytes()
    assert content.count(b"Caffee") == 1
    path.write_bytes(content.replace(b"Caffee", b"Caff\xe9 "))
    assert probe_video(path).num_frames == 5
