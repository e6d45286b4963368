"""Clips as h264 mp4, single frames as png, under the names that musubi-tuner's users look for.

Files appear whole or not at all. The recipe of a sample is stored in the file: in the comment of an mp4, in the text
chunk "comment" of a png.
"""

from collections.abc import Iterable
from datetime import datetime
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from wanlora.foundation.errors import DataError
from wanlora.foundation.files import atomic_path
from wanlora.generation.pipeline import Frames

if TYPE_CHECKING:  # libraries for media are imported where they write, because a start does without them
    from av import VideoFrame

WAN_FPS = 16
"""Frames per second that Wan 2.1 was trained on."""
_CRF = "18"
"""h264 quality: hardly distinguishable from the source."""


def preview_path(
    output_dir: Path,
    name: str,
    *,
    index: int,
    seed: int,
    when: datetime,
    num_frames: int,
    step: int | None = None,
    epoch: int | None = None,
) -> Path:
    """`<output_dir>/sample/<name>_<e000003 or 000120>_<index>_<time>_<seed>.<mp4 or png>`.

    The epoch is named where one is given, otherwise the step.
    """
    moment = f"{step or 0:06d}" if epoch is None else f"e{epoch:06d}"
    suffix = ".png" if num_frames == 1 else ".mp4"
    return output_dir / "sample" / f"{name}_{moment}_{index:02d}_{when:%Y%m%d%H%M%S}_{seed}{suffix}"


def write_frames(path: Path, frames: Frames, *, fps: float = WAN_FPS, recipe: str = "") -> None:
    """Write [F, H, W, 3] uint8 as what the suffix of `path` says: a clip (.mp4) or its first frame (.png)."""
    if path.suffix == ".png":
        write_image(path, frames[0], recipe=recipe)
    else:
        write_video(path, frames, fps=fps, recipe=recipe)


def write_video(path: Path, frames: Frames, fps: float = WAN_FPS, *, recipe: str = "") -> None:
    """Write [F, H, W, 3] uint8 as an mp4 that every player shows: h264, 4:2:0, BT.709, header first.

    Raises `DataError` for odd sizes, which 4:2:0 cannot hold.
    """
    import av
    from av.video.reformatter import ColorRange, Colorspace

    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise DataError(f"{path.name}: a clip of {width}x{height} cannot be written as mp4; both sides must be even")
    with (
        atomic_path(path) as temporary,
        av.open(str(temporary), "w", format="mp4", options={"movflags": "faststart"}) as container,
    ):
        container.metadata["comment"] = recipe
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": _CRF})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.colorspace = Colorspace.ITU709
        stream.codec_context.color_range = ColorRange.MPEG
        for frame in _video_frames(frames):
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def write_image(path: Path, frame: Frames, *, recipe: str = "") -> None:
    """Write [H, W, 3] uint8 as png."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    text.add_itxt("comment", recipe)
    with atomic_path(path) as temporary:
        Image.fromarray(frame).save(temporary, format="png", pnginfo=text)


def _video_frames(frames: Frames) -> "Iterable[VideoFrame]":
    """Each picture in the encoder's colours, said explicitly: players assume BT.709 only for large clips."""
    from av import VideoFrame
    from av.video.reformatter import ColorRange, Colorspace

    for picture in frames:
        frame = VideoFrame.from_ndarray(picture, format="rgb24")
        yield frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
