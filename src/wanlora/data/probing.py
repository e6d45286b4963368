"""Measuring a video without decoding it: exact frame count, timestamps, size as shown.

Containers lie about frame counts (Matroska holds none, edit lists hide frames) and duration times rate is off by one
often enough to drop clips. So the packets are read once and their presentation times counted; only the first frame is
decoded, for its size and rotation. A file whose end is missing is found here, before hours of encoding.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import av

from wanlora.data.images import image_size
from wanlora.data.info import VideoInfo
from wanlora.data.rates import MODEL_FPS
from wanlora.data.sources import IMAGE_SUFFIXES, Source
from wanlora.foundation.errors import DataError

_OPEN_OPTIONS: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
"""Titles are often not in UTF-8; PyAV reads them leniently by itself from version 19 on."""
_SAME_RATE = 0.01
_END_SLACK = 0.25
"""Seconds that may be missing at the end of a Matroska file before it counts as cut off."""


def probe(source: Source) -> VideoInfo:
    """Measure a picture, which counts as a clip of one frame, or a clip. Raises `DataError`."""
    if source.kind == "video":
        return probe_video(source.path)
    width, height = image_size(source.path)
    return VideoInfo(width=width, height=height, times=(0.0,), rate=MODEL_FPS)


def probe_video(path: Path) -> VideoInfo:
    """Measure a video file, or a folder of pictures that are its frames.

    Raises `DataError` for what is missing, empty, cut off, not a video or without a picture.
    """
    if path.is_dir():
        return _probe_folder(path)
    with opened_video(path) as (container, stream):
        seen = _read_packets(container, stream, path)
        if seen.first_frame is None or not seen.times:
            raise DataError(f"{path} holds no picture that can be decoded; replace it or take it out of the dataset")
        _require_complete(container, stream, seen, path)
        rate = _rate(stream, seen.times)
        frame = seen.first_frame
        width, height = (frame.height, frame.width) if frame.rotation % 180 else (frame.width, frame.height)
        times = sorted(seen.times)
        if any(time is None for time in seen.raw_times):
            times = [index / rate for index in range(len(times))]
        return VideoInfo(
            width=width, height=height, times=tuple(round(time - times[0], 6) for time in times), rate=rate
        )


@contextmanager
def opened_video(path: Path) -> Iterator[tuple[Any, Any]]:
    """The container and its video stream; every fault of the file becomes a `DataError` that names it."""
    try:
        with av.open(str(path), **_OPEN_OPTIONS) as container:
            stream = container.streams.best("video")
            if stream is None:
                raise DataError(f"{path} holds no video, only sound; take it out of the dataset")
            yield container, stream
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist; check the spelling and the drive") from error
    except av.FFmpegError as error:
        raise DataError(
            f"{path} is damaged, was not completely written or is no video ({_reason(error)}); "
            "replace it or take it out of the dataset"
        ) from error


def frame_files(folder: Path) -> tuple[Path, ...]:
    """The pictures of a folder in the order of the numbers in their names."""
    files = [file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES]
    return tuple(sorted(files, key=lambda file: _numbers_in_order(file.name)))


@dataclass(kw_only=True, slots=True)
class _Packets:
    """What one walk over the packets shows."""

    raw_times: list[float | None]
    """Presentation time of each packet that is shown, in seconds; None where the container gives none."""
    num_packets: int
    end: float
    first_frame: Any

    @property
    def times(self) -> list[float]:
        return [0.0 if time is None else time for time in self.raw_times]


def _read_packets(container: Any, stream: Any, path: Path) -> _Packets:
    seen = _Packets(raw_times=[], num_packets=0, end=0.0, first_frame=None)
    for packet in container.demux(stream):
        if seen.first_frame is None:
            seen.first_frame = next(iter(packet.decode()), None)
        if packet.size == 0 and packet.dts is None:
            continue  # the flush at the end
        seen.num_packets += 1
        if packet.is_discard or _is_hidden(stream, packet):
            continue
        time = None if packet.pts is None else float(packet.pts * stream.time_base)
        seen.raw_times.append(time)
        seen.end = max(seen.end, (time or 0.0) + float((packet.duration or 0) * stream.time_base))
    return seen


def _is_hidden(stream: Any, packet: Any) -> bool:
    """Whether a VP8 packet is only referred to and never shown: bit 4 of its first byte (RFC 6386, 9.1) is clear."""
    return stream.codec_context.name == "vp8" and not bytes(packet)[0] & 0x10


def _require_complete(container: Any, stream: Any, seen: _Packets, path: Path) -> None:
    """Raise `DataError` if the end of the file is missing."""
    if seen.num_packets < stream.frames:
        raise DataError(
            f"{path} is cut off: it announces {stream.frames} frames and holds {seen.num_packets}; "
            "copy or export it again, or take it out of the dataset"
        )
    announced = _matroska_duration(container, stream)
    times = sorted(seen.times)
    longest_gap = max((after - before for before, after in pairwise(times)), default=0.0)
    if announced is not None and seen.end + longest_gap + _END_SLACK < announced:
        raise DataError(
            f"{path} is cut off: it announces {announced:.2f} s and ends after {seen.end:.2f} s; "
            "copy or export it again, or take it out of the dataset"
        )


def _matroska_duration(container: Any, stream: Any) -> float | None:
    """The announced length of the video in seconds, for the containers that announce no frame count."""
    if "matroska" not in container.format.name:
        return None
    tag = re.fullmatch(r"(\d+):(\d+):([\d.]+)", stream.metadata.get("DURATION", ""))
    if tag:
        return int(tag[1]) * 3600 + int(tag[2]) * 60 + float(tag[3])
    alone = len(container.streams) == 1
    return container.duration / av.time_base if alone and container.duration else None


def _rate(stream: Any, times: list[float]) -> float:
    """The stream's rate if its timestamps agree with it, theirs otherwise: Matroska rounds them."""
    stated = float(stream.average_rate or stream.guessed_rate or MODEL_FPS)
    span = max(times) - min(times)
    if span <= 0:
        return stated
    measured = (len(times) - 1) / span
    rounding = 0.002 / span
    return stated if abs(stated / measured - 1) <= _SAME_RATE + rounding else measured


def _probe_folder(folder: Path) -> VideoInfo:
    files = frame_files(folder)
    if not files:
        raise DataError(f"{folder} holds no pictures; a clip given as a folder needs its frames in it")
    width, height = image_size(files[0])
    times = tuple(round(index / MODEL_FPS, 6) for index in range(len(files)))
    return VideoInfo(width=width, height=height, times=times, rate=MODEL_FPS)


def _numbers_in_order(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"([0-9]+)", name) if part]


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error).strip() or type(error).__name__
