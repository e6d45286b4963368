"""Decoding a clip once for everything that is wanted of it.

The usual way decodes a clip anew for every window and size and keeps all its frames in full size. Here one pass serves
any number of requests: each frame is resized as it arrives, once per size, handed to the requests that hold it, and
forgotten; a request is given away as soon as its last frame is there, and decoding stops when nothing more is wanted.
Damage that decoders pass over in silence (a short count, a frame marked corrupt, a size that changes) is an error.

FFmpeg's log level is never set: with frame threads that can hang a decoder that meets an error.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from wanlora.data.buckets import Size
from wanlora.data.images import read_image
from wanlora.data.info import VideoInfo
from wanlora.data.probing import frame_files, opened_video
from wanlora.data.resize import Clip, Picture, resize_to_cover
from wanlora.foundation.errors import DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class FrameRequest:
    """Frames of one clip at one size."""

    indexes: tuple[int, ...]
    """Source frames, ascending; one may repeat."""
    width: int
    height: int

    @property
    def size(self) -> Size:
        """Width and height."""
        return self.width, self.height


@dataclass(slots=True)
class DecodeCount:
    """How much was decoded in this process; read by tests and by the report after caching."""

    passes: int = 0
    frames: int = 0


decoded = DecodeCount()


def decode(path: Path, requests: Sequence[FrameRequest], info: VideoInfo) -> Iterator[tuple[int, Clip]]:
    """One pass over the clip at `path`: (position in `requests`, frames) as each request is complete.

    `info` is what probing found; frames are uint8, frames x height x width x RGB. Raises `DataError` naming the file
    and the frame where the clip is damaged or ends early.
    """
    waiting = _Waiting(requests)
    decoded.passes += 1
    index = -1
    frames = _folder_frames(path) if path.is_dir() else _video_frames(path)
    for index, picture in enumerate(frames):
        decoded.frames += 1
        if picture.shape[:2] != (info.height, info.width):
            was = f"{info.width}x{info.height}"
            raise DataError(
                f"{path}: frame {index} is {picture.shape[1]}x{picture.shape[0]}, the clip began as {was}; "
                "split or re-encode it"
            )
        yield from waiting.receive(index, picture)
        if not waiting.requests:
            return
    raise DataError(
        f"{path} ends after {index + 1} of {info.num_frames} frames: it is damaged or was changed; "
        "replace it, re-encode it or take it out of the dataset"
    )


class _Waiting:
    """The requests that are not complete, and the resized frames that they still need."""

    def __init__(self, requests: Sequence[FrameRequest]) -> None:
        self.requests = dict(enumerate(requests))
        self.pictures: dict[tuple[int, Size], Picture] = {}
        self.sizes_at: dict[int, set[Size]] = defaultdict(set)
        self.complete_at: dict[int, list[int]] = defaultdict(list)
        self.needed_until: dict[tuple[int, Size], int] = defaultdict(int)
        for position, request in self.requests.items():
            last = request.indexes[-1]
            self.complete_at[last].append(position)
            for index in request.indexes:
                self.sizes_at[index].add(request.size)
                self.needed_until[index, request.size] = max(self.needed_until[index, request.size], last)

    def receive(self, index: int, picture: Picture) -> Iterator[tuple[int, Clip]]:
        """Take frame `index`; give away what it completes."""
        for size in sorted(self.sizes_at[index]):
            self.pictures[index, size] = resize_to_cover(picture, *size)
        for position in self.complete_at[index]:
            request = self.requests.pop(position)
            yield position, np.stack([self.pictures[i, request.size] for i in request.indexes])
        self.pictures = {key: kept for key, kept in self.pictures.items() if self.needed_until[key] > index}


def _video_frames(path: Path) -> Iterator[Picture]:
    """Every shown frame, upright, as RGB."""
    with opened_video(path) as (container, stream):
        stream.thread_type = "AUTO"
        for index, frame in enumerate(container.decode(stream)):
            if frame.is_corrupt:
                raise DataError(f"{path}: frame {index} is damaged; replace the file or take it out of the dataset")
            picture = frame.to_ndarray(format="rgb24")
            yield np.rot90(picture, k=frame.rotation // 90) if frame.rotation else picture


def _folder_frames(folder: Path) -> Iterator[Picture]:
    return map(read_image, frame_files(folder))
