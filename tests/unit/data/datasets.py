"""Dataset tables without a file, and caches with made-up content."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from wanlora.config.dataset import DatasetConfig, DatasetsConfig, ImageDatasetConfig, VideoDatasetConfig
from wanlora.data.cache_files import source_fingerprint
from wanlora.data.cache_tensors import write_latents, write_text
from wanlora.data.items import Item
from wanlora.data.plan import DataPlan
from wanlora.foundation.shapes import LatentShape

RESOLUTION = (64, 48)


def clips_table(folder: Path, cache: Path, **keys: Any) -> VideoDatasetConfig:
    """A `[[datasets]]` of clips at 64x48."""
    given = {"resolution": RESOLUTION, "caption_extension": ".txt", "where": "style.toml: [[datasets]] 1", **keys}
    return VideoDatasetConfig(video_directory=folder, cache_directory=cache, **given)


def pictures_table(folder: Path, cache: Path, **keys: Any) -> ImageDatasetConfig:
    """A `[[datasets]]` of pictures at 64x48."""
    given = {"resolution": RESOLUTION, "caption_extension": ".txt", "where": "style.toml: [[datasets]] 2", **keys}
    return ImageDatasetConfig(image_directory=folder, cache_directory=cache, **given)


def tables(*datasets: DatasetConfig, validation: tuple[DatasetConfig, ...] = ()) -> DatasetsConfig:
    """A dataset file."""
    return DatasetsConfig(path=Path("style.toml"), datasets=datasets, validation=validation)


def latents_for(item: Item, value: float = 0.5) -> torch.Tensor:
    """Latents of the right shape."""
    shape = LatentShape.of(item.pixels)
    return torch.full((16, shape.frames, shape.height, shape.width), value, dtype=torch.bfloat16)


def fill_caches(plan: DataPlan) -> None:
    """Write every cache file of a plan; the n-th sample holds the number n."""
    for number, item in enumerate(plan.cached_items):
        stamp = item.stamp(vae="vae", vae_dtype="float32")
        write_latents(item.latent_path, latents_for(item, number), stamp, source_fingerprint(item.source.path))
        write_text(item.text_path, torch.full((3, 8), number), caption=item.source.caption or "", t5="t5")


def rows_table(path: Path, cache: Path, rows: Sequence[tuple[Path, str]], **keys: Any) -> VideoDatasetConfig:
    """A `[[datasets]]` of clips listed in a JSONL file, which is written."""
    lines = [json.dumps({"video_path": str(clip), "caption": caption}) for clip, caption in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    given = {"resolution": RESOLUTION, "where": "style.toml: [[datasets]] 1", **keys}
    return VideoDatasetConfig(video_jsonl_file=path, cache_directory=cache, **given)
