"""The numbers in cache files: latents and text, written whole or not at all, and never with a value that is not finite.

What the files are called and when they are fresh is in `cache_files`.
"""

from pathlib import Path

import torch
from torch import Tensor

from wanlora.data.cache_files import ARCHITECTURE, FORMAT_VERSION, OURS, LatentStamp, latents_key, text_key
from wanlora.foundation.dtypes import dtype_name
from wanlora.foundation.errors import CheckpointError, DataError
from wanlora.foundation.files import Fingerprint
from wanlora.foundation.shapes import LatentShape
from wanlora.foundation.tensor_files import SafetensorsSource, save_tensors


def write_latents(path: Path, latents_CFHW: Tensor, stamp: LatentStamp, source: Fingerprint) -> None:
    """Write a latent cache, whole or not at all.

    `stamp` gives vae and vae_dtype; the tensor's own dtype is the stored one. Raises `DataError` for latents that are
    not finite or not of the stamped shape.
    """
    frames, height, width = latents_CFHW.shape[1:]
    if LatentShape(frames, height, width) != stamp.latents:
        raise DataError(f"{path}: latents of {frames}x{height}x{width} do not fit {stamp.pixels}")
    if not torch.isfinite(latents_CFHW).all():
        raise DataError(f"{path}: the VAE gave values that are not finite; use --vae_dtype float32")
    recorded = (stamp.pixels.width, stamp.pixels.height) if stamp.window else stamp.original
    metadata = {
        "architecture": ARCHITECTURE,
        "format_version": FORMAT_VERSION,
        "width": str(recorded[0]),
        "height": str(recorded[1]),
        **({"frame_count": str(stamp.window.frames)} if stamp.window else {}),
        **stamp.record(),
        **_record_source(source),
    }
    key = f"latents_{frames}x{height}x{width}_{dtype_name(latents_CFHW.dtype)}"
    save_tensors(path, {key: latents_CFHW}, metadata)


def read_latents(path: Path) -> Tensor:
    """The latents, C x F x H x W in their stored format. Raises `DataError` naming the file."""
    with _opened(path) as file:
        latents: Tensor = file.read(latents_key(file.header))
    return _finite(path, latents)


def write_text(path: Path, text_TD: Tensor, *, caption: str, t5: str) -> None:
    """Write a text cache, whole or not at all: the T real tokens of `caption` as encoded by the encoder named `t5`."""
    if not torch.isfinite(text_TD).all():
        raise DataError(f"{path}: the text encoder gave values that are not finite; run without --fp8_t5")
    metadata = {
        "architecture": ARCHITECTURE,
        "format_version": FORMAT_VERSION,
        "caption1": caption,
        f"{OURS}t5": t5,
    }
    save_tensors(path, {f"varlen_t5_{dtype_name(text_TD.dtype)}": text_TD}, metadata)


def read_text(path: Path) -> Tensor:
    """The text, T x D in its stored format. Raises `DataError` naming the file."""
    with _opened(path) as file:
        text: Tensor = file.read(text_key(file.header))
    return _finite(path, text)


def _record_source(source: Fingerprint) -> dict[str, str]:
    return {
        f"{OURS}source_size": str(source.size),
        f"{OURS}source_mtime_ns": str(source.mtime_ns),
        f"{OURS}source_digest": source.digest,
    }


def _opened(path: Path) -> SafetensorsSource:
    try:
        return SafetensorsSource(path)
    except CheckpointError as error:
        raise DataError(str(error)) from error


def _finite(path: Path, tensor: Tensor) -> Tensor:
    if not torch.isfinite(tensor).all():
        raise DataError(f"{path} holds values that are not finite; delete it and cache again")
    return tensor
