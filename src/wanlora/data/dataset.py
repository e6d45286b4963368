"""Batches read from cache files."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from wanlora.data.cache_tensors import read_latents, read_text
from wanlora.data.order import BatchSpec
from wanlora.data.plan import DataPlan
from wanlora.foundation.errors import DataError
from wanlora.foundation.shapes import LatentShape, PixelShape


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Samples of one shape."""

    latents_BCFHW: Tensor
    """As the VAE gave them, normalised, in the format they are stored in."""
    text: list[Tensor]
    """One T x D tensor per sample, each at its real length."""
    names: tuple[str, ...]
    """Names of the latent cache files, for messages."""
    pixels: PixelShape

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory; called by the loader."""
        return Batch(
            latents_BCFHW=self.latents_BCFHW.pin_memory(),
            text=[text_TD.pin_memory() for text_TD in self.text],
            names=self.names,
            pixels=self.pixels,
        )


class CachedBatches(Dataset[Batch]):
    """Reads the batch that a `BatchSpec` names; holds nothing but paths, so it is cheap to send to workers."""

    def __init__(self, paths: Sequence[tuple[Path, Path]]) -> None:
        """`paths` are the latent and the text cache of each sample, in the order of the plan."""
        self.paths = tuple((str(latents), str(text)) for latents, text in paths)

    @classmethod
    def of(cls, plan: DataPlan) -> "CachedBatches":
        """The dataset of a plan."""
        return cls([(item.latent_path, item.text_path) for item in plan.items])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, spec: BatchSpec) -> Batch:
        """Read a batch. Raises `DataError` naming the file that is missing, broken or of another shape."""
        paths = [(Path(latents), Path(text)) for latents, text in (self.paths[index] for index in spec.indexes)]
        return Batch(
            latents_BCFHW=torch.stack([_latents(path, spec.pixels) for path, _ in paths]),
            text=[read_text(path) for _, path in paths],
            names=tuple(path.name for path, _ in paths),
            pixels=spec.pixels,
        )


def _latents(path: Path, pixels: PixelShape) -> Tensor:
    latents_CFHW = read_latents(path)
    found = LatentShape(*latents_CFHW.shape[1:])
    if found != LatentShape.of(pixels):
        raise DataError(f"{path} was cached for {found.pixels()}, the dataset asks for {pixels}; cache it again")
    return latents_CFHW
