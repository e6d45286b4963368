"""The cache files: names, tensors and metadata that musubi made and reads, plus what tells fresh from stale.

Latents:  `<stem>_<W>x<H>_wan.safetensors` (pictures, original size) and
          `<stem>_<start>-<frames>_<W>x<H>_wan.safetensors` (clips, bucket size), one tensor `latents_FxHxW_<dtype>`.
Text:     `<stem>_wan_te.safetensors`, one per source and shared by its windows, one tensor `varlen_t5_<dtype>`.

Existence is the usual test of freshness, which trains stale latents after every change of resolution. Ours record the
source, the window, the resampling and the VAE; `latent_is_fresh` compares. Files without that record are believed when
their name and shape fit. Comparing takes headers alone; `cache_tensors` reads and writes the numbers.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from wanlora.data.buckets import Size
from wanlora.data.windows import Window
from wanlora.foundation.errors import CheckpointError, DataError
from wanlora.foundation.files import Fingerprint, fingerprint
from wanlora.foundation.headers import Header, read_header
from wanlora.foundation.shapes import LatentShape, PixelShape

ARCHITECTURE = "wan"
FORMAT_VERSION = "1.0.1"
LATENT_SUFFIX = "_wan.safetensors"
TEXT_SUFFIX = "_wan_te.safetensors"
_LATENTS = re.compile(r"latents_(?P<frames>\d+)x(?P<height>\d+)x(?P<width>\d+)_(?P<dtype>[a-z0-9_]+)")
_NAME = re.compile(r"(?P<stem>.*?)(_(?P<start>\d{5,})-(?P<frames>\d{3,}))?_(?P<width>\d{4,})x(?P<height>\d{4,})")
OURS = "wanlora_"
"""Begins the names of what only our files record."""


@dataclass(frozen=True, slots=True)
class LatentName:
    """What the name of a latent cache file says."""

    stem: str
    size: Size
    """The original size of a picture, the bucket of a clip."""
    window: Window | None = None
    """None for pictures."""

    def __str__(self) -> str:
        window = f"_{self.window.start:05d}-{self.window.frames:03d}" if self.window else ""
        return f"{self.stem}{window}_{self.size[0]:04d}x{self.size[1]:04d}{LATENT_SUFFIX}"

    @classmethod
    def parse(cls, name: str) -> "LatentName | None":
        """The parts of a file name, read from its end; None if it is no latent cache of Wan."""
        if not name.endswith(LATENT_SUFFIX):
            return None
        match = _NAME.fullmatch(name.removesuffix(LATENT_SUFFIX))
        if match is None:
            return None
        window = Window(int(match["start"]), int(match["frames"])) if match["start"] else None
        return cls(match["stem"], (int(match["width"]), int(match["height"])), window)


def text_name(stem: str) -> str:
    """The name of the text cache of a source."""
    return stem + TEXT_SUFFIX


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentStamp:
    """What a latent cache was made of. None in a field that is compared means: not to be compared."""

    pixels: PixelShape
    """The bucket and the window's length."""
    original: Size
    """Size of the source as shown."""
    window: Window | None = None
    resampling: str | None = ""
    """The rule of `rates.Resampling`; empty when frames were taken as they stand."""
    vae: str | None = None
    """What tells this VAE from others."""
    vae_dtype: str | None = None
    """The format of the VAE's arithmetic, as `float32`."""
    dtype: str | None = None
    """The format the latents are stored in, as `bfloat16`."""

    @property
    def latents(self) -> LatentShape:
        """The shape of the latents."""
        return LatentShape.of(self.pixels)

    def record(self) -> dict[str, str]:
        """Our metadata; the caller has given every field."""
        window = f"{self.window.start}+{self.window.frames}" if self.window else ""
        return {
            f"{OURS}window": window,
            f"{OURS}resampling": self.resampling or "",
            f"{OURS}vae": self.vae or "",
            f"{OURS}vae_dtype": self.vae_dtype or "",
        }


def latent_is_fresh(
    path: Path, stamp: LatentStamp, source: Path | None = None, *, channels: int | None = None
) -> str | None:
    """None if the cache at `path` is what `stamp` asks for; otherwise why not, in words that follow the file's name.

    `source` is compared when given and present; the stamp's None fields are not compared, nor `channels` if None.
    """
    if not path.is_file():
        return "is missing"
    try:
        file = header_of(path)
        return _latent_difference(file, stamp, channels) or _source_difference(file.metadata, source)
    except DataError as error:
        return f"cannot be read ({error})"


def text_is_fresh(
    path: Path, *, caption: str | None = None, t5: str | None = None, width: int | None = None
) -> str | None:
    """None if the text cache at `path` belongs to `caption` and `t5` and has `width` numbers a token; otherwise why
    not, as in `latent_is_fresh`. What is None is not compared.
    """
    if not path.is_file():
        return "is missing"
    try:
        file = header_of(path)
        found = file.tensors[text_key(file)].shape[-1]
    except DataError as error:
        return f"cannot be read ({error})"
    metadata = file.metadata
    if other := _other_model(metadata):
        return other
    if width is not None and found != width:
        return f"holds {found} numbers a token where the model reads {width}: another text encoder made it"
    if caption is not None and metadata.get("caption1", caption).strip() != caption:
        return "belongs to another caption than the one that stands there now"
    return _recorded_difference(metadata, "t5", t5, "was made with another text encoder")


def header_of(path: Path) -> Header:
    """What a cache file says of itself. Raises `DataError` naming it."""
    try:
        return read_header(path)
    except CheckpointError as error:
        raise DataError(str(error)) from error


def latents_key(file: Header) -> str:
    """The name of the tensor of a latent cache. Raises `DataError` if it has none or one of another shape."""
    found = [name for name in file.names if _LATENTS.fullmatch(name)]
    if len(found) != 1:
        raise DataError(f"{file.path} holds no latents; run wan_cache_latents.py")
    shape, said = file.tensors[found[0]].shape, _shape_in(found[0])
    if shape[1:] != (said.frames, said.height, said.width):
        raise DataError(f"{file.path} holds a tensor of shape {shape} under the name {found[0]}; cache it again")
    return found[0]


def text_key(file: Header) -> str:
    """The name of the tensor of a text cache. Raises `DataError` if it has none."""
    found = [name for name in file.names if name.startswith("varlen_t5_")]
    if len(found) != 1:
        raise DataError(f"{file.path} holds no text; run wan_cache_text_encoder_outputs.py")
    return found[0]


def has_image_conditioning(path: Path) -> bool:
    """Whether a latent cache also holds what image-to-video training reads. Raises `DataError`."""
    return any(name.startswith(("latents_image_", "clip_")) for name in header_of(path).names)


def source_fingerprint(path: Path) -> Fingerprint:
    """The fingerprint of a source; for a folder of frames, of the list of its files."""
    if path.is_file():
        return fingerprint(path)
    parts = [(file.name, fingerprint(file)) for file in sorted(path.iterdir()) if file.is_file()]
    return Fingerprint(
        size=sum(part.size for _, part in parts),
        mtime_ns=max((part.mtime_ns for _, part in parts), default=0),
        digest=hashlib.blake2b(
            repr([(name, part.digest) for name, part in parts]).encode(), digest_size=16
        ).hexdigest(),
    )


def _other_model(metadata: Mapping[str, str]) -> str | None:
    architecture = metadata.get("architecture", ARCHITECTURE)
    return None if architecture == ARCHITECTURE else f"belongs to another model ({architecture})"


def _latent_difference(file: Header, stamp: LatentStamp, channels: int | None) -> str | None:
    metadata = file.metadata
    if other := _other_model(metadata):
        return other
    key = latents_key(file)
    width = file.tensors[key].shape[0]
    if channels is not None and width != channels:
        return f"holds latents of {width} channels where the model reads {channels}: another VAE made it"
    found = _shape_in(key)
    if found != stamp.latents:
        was = found.pixels()
        length = f" and {was.frames} frames" if was.frames != stamp.pixels.frames else ""
        asked = f"{stamp.pixels.width}x{stamp.pixels.height}"
        return f"was cached for {was.width}x{was.height}{length}, the dataset now asks for {asked}"
    if stamp.dtype is not None and not key.endswith(f"_{stamp.dtype}"):
        return f"is stored as {key.rsplit('_', 1)[1]}, not {stamp.dtype}"
    return (
        _recorded_difference(metadata, "resampling", stamp.resampling, "holds frames chosen by another frame rate")
        or _recorded_difference(metadata, "vae", stamp.vae, "was made with another VAE")
        or _recorded_difference(metadata, "vae_dtype", stamp.vae_dtype, "was made with another --vae_dtype")
    )


def _recorded_difference(metadata: Mapping[str, str], key: str, expected: str | None, reason: str) -> str | None:
    if expected is None or metadata.get(OURS + key, expected) == expected:
        return None
    return reason


def _source_difference(metadata: Mapping[str, str], source: Path | None) -> str | None:
    """Size and time decide when they agree; otherwise the content does, so that a copied folder stays fresh."""
    if source is None or f"{OURS}source_digest" not in metadata or not source.exists():
        return None
    if source.is_file():
        status = source.stat()
        same_size = metadata[f"{OURS}source_size"] == str(status.st_size)
        if same_size and metadata[f"{OURS}source_mtime_ns"] == str(status.st_mtime_ns):
            return None
    same = source_fingerprint(source).digest == metadata[f"{OURS}source_digest"]
    return None if same else f"is older than {source.name}, which has changed"


def _shape_in(key: str) -> LatentShape:
    match = _LATENTS.fullmatch(key)
    assert match is not None
    return LatentShape(int(match["frames"]), int(match["height"]), int(match["width"]))
