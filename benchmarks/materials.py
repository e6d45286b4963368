"""What a benchmark trains on: a transformer of real size with random weights, and caches of the reference mix.

Speed and memory depend on shapes and number formats alone, so nothing has to be downloaded. The checkpoint is one bf16
file with the official names, drawn on the card and written in one go; its values keep signals and gradients at an
ordinary size. Latents and texts are written by the project's own cache writer; sources do not exist, and the trainer
plans from the names of the caches, as it does on any machine that has only them.
"""

import json
import math
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import toml
import torch
from torch import Tensor

from wanlora.data.cache_files import LatentName, LatentStamp, text_name
from wanlora.data.cache_tensors import write_latents, write_text
from wanlora.data.windows import Window
from wanlora.foundation.files import Fingerprint
from wanlora.foundation.files import write_text as write_text_file
from wanlora.foundation.shapes import LatentShape, PixelShape
from wanlora.models.wan.spec import TASKS, WanSizes
from wanlora.models.wan.transformer import WanTransformer

TEXT_TOKENS = 120
"""Real length of every caption."""
LATENT_CHANNELS = 16
_MATRIX_DEVIATION = 0.02
_FOLDER = "wanlora-benchmark"
_GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Bucket:
    """One kind of sample in the mix."""

    kind: str
    """image or video."""
    pixels: PixelShape
    per_epoch: int
    """Samples in an epoch of the reference run."""
    batch_size: int = 1

    @property
    def num_tokens(self) -> int:
        """Video tokens of a batch."""
        return self.batch_size * LatentShape.of(self.pixels).num_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """A transformer's size, the task that trains it, and the mix it is measured on."""

    task: str
    sizes: WanSizes
    buckets: tuple[Bucket, ...]

    @property
    def proportions(self) -> tuple[int, ...]:
        """How often each bucket comes in the mix for once that the rarest does."""
        rarest = min(bucket.per_epoch for bucket in self.buckets)
        return tuple(bucket.per_epoch // rarest for bucket in self.buckets)

    @property
    def equal_batches(self) -> tuple[Bucket, Bucket]:
        """Two ways to the same number of tokens: a batch of first frames, and one short clip of the same size."""
        short, long = self.buckets[1:3]
        return replace(short, batch_size=long.num_tokens // short.num_tokens), long


@dataclass(frozen=True, kw_only=True, slots=True)
class Materials:
    """The files of a benchmark."""

    dit: Path
    dataset: Path
    """The dataset TOML."""


def _mix(*shapes: tuple[int, int, int]) -> tuple[Bucket, ...]:
    """The reference run's epoch, at these sizes: 120 pictures, 240 first frames, 240 short and 480 long clips."""
    kinds = ("image", "video", "video", "video")
    counts = (120, 240, 240, 480)
    return tuple(
        Bucket(kind=kind, pixels=PixelShape(*shape), per_epoch=count)
        for kind, shape, count in zip(kinds, shapes, counts, strict=True)
    )


_REFERENCE_MIX = _mix((768, 768, 1), (768, 416, 1), (768, 416, 21), (384, 208, 45))
GEOMETRIES: dict[str, Geometry] = {
    "14B": Geometry(task="t2v-14B", sizes=TASKS["t2v-14B"].sizes, buckets=_REFERENCE_MIX),
    "1.3B": Geometry(task="t2v-1.3B", sizes=TASKS["t2v-1.3B"].sizes, buckets=_REFERENCE_MIX),
    "tiny": Geometry(
        task="t2v-14B",
        sizes=WanSizes(dim=128, ffn_dim=256, num_layers=12, text_dim=256),
        buckets=_mix((96, 96, 1), (96, 64, 1), (96, 64, 5), (64, 32, 9)),
    ),
}
"""What `--geometry` names; tiny rehearses on any machine."""


def checkpoint_path(weights: Path, name: str) -> Path:
    """Where the checkpoint of a geometry lies."""
    return weights / f"wan_random_{name}_bf16.safetensors"


def make_checkpoint(weights: Path, name: str) -> None:
    """Write the checkpoint of a geometry unless it is there."""
    path, sizes = checkpoint_path(weights, name), GEOMETRIES[name].sizes
    if not path.exists():
        print(f"writing {checkpoint_bytes(sizes) / 1e9:.1f} GB of random weights to {path}", flush=True)
        write_checkpoint(path, sizes)


def make_dataset(work: Path, name: str, batches: int) -> Path:
    """The TOML of a dataset with so many batches of each bucket of the mix; made unless it is there."""
    return _made(work / f"dataset-{name}-{batches}", GEOMETRIES[name], batches)


def make_mix(work: Path, name: str, batches: int) -> Path:
    """The same with so many batches of the rarest bucket, and of the others in the proportion of the mix."""
    return _made(work / f"dataset-{name}-mix-{batches}", GEOMETRIES[name], batches, in_proportion=True)


def make_equal_batches(work: Path, name: str, batches: int) -> Path:
    """The same for `equal_batches`."""
    geometry = replace(GEOMETRIES[name], buckets=GEOMETRIES[name].equal_batches)
    return _made(work / f"dataset-{name}-equal-{batches}", geometry, batches)


def _made(folder: Path, geometry: Geometry, batches: int, *, in_proportion: bool = False) -> Path:
    path = folder / "dataset.toml"
    if not path.exists():
        write_dataset(folder, geometry, batches, in_proportion=in_proportion)
    return path


def choose_folders(name: str) -> tuple[Path, Path]:
    """Where caches and output go, and where the checkpoint goes: into memory-backed storage if it fits there."""
    shared, work = Path("/dev/shm"), Path(tempfile.gettempdir()) / _FOLDER
    weights = shared / _FOLDER
    fits = shared.is_dir() and shutil.disk_usage(shared).free > checkpoint_bytes(GEOMETRIES[name].sizes) + _GIB
    return work, weights if fits or checkpoint_path(weights, name).exists() else work


def checkpoint_bytes(sizes: WanSizes) -> int:
    """Bytes of a bf16 checkpoint, header left out."""
    return sum(2 * math.prod(shape) for shape in _shapes(sizes).values())


def write_checkpoint(path: Path, sizes: WanSizes) -> None:
    """Write random weights as one bf16 safetensors file, a tensor at a time, through one page-locked buffer."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes = _shapes(sizes)
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    largest = max(map(math.prod, shapes.values()))
    buffer = torch.empty(largest, dtype=torch.bfloat16, pin_memory=device.type == "cuda")
    generator = torch.Generator(device).manual_seed(0)
    temporary = path.with_suffix(".partial")  # not flushed to the disk, as a file worth keeping would be
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            flat = buffer[: math.prod(shape)]
            flat.copy_(draw_tensor(name, shape, generator).flatten())
            file.write(flat.view(torch.uint8).numpy().data)
    temporary.replace(path)


def _shapes(sizes: WanSizes) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = WanTransformer(sizes)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def draw_tensor(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Gains are one, biases zero, modulations and matrices small."""
    if name.endswith("bias"):
        return torch.zeros(shape, dtype=torch.bfloat16, device=generator.device)
    if "norm" in name:
        return torch.ones(shape, dtype=torch.bfloat16, device=generator.device)
    deviation = shape[-1] ** -0.5 if name.endswith("modulation") else _MATRIX_DEVIATION
    return torch.randn(shape, dtype=torch.bfloat16, device=generator.device, generator=generator) * deviation


def write_dataset(folder: Path, geometry: Geometry, batches: int, *, in_proportion: bool) -> None:
    """Write random latents and texts for so many batches of each bucket, and last the TOML that asks for them.

    `in_proportion` repeats them as often as the mix has them.
    """
    generator = torch.Generator().manual_seed(1)
    for bucket in geometry.buckets:
        caches = _caches(folder, bucket)
        caches.mkdir(parents=True, exist_ok=True)
        for number in range(batches * bucket.batch_size):
            _write_item(caches, f"item_{number:03d}", bucket, geometry.sizes.text_dim, generator)
    content = {"general": {"enable_bucket": True, "bucket_no_upscale": True}}
    repeats = geometry.proportions if in_proportion else [1] * len(geometry.buckets)
    tables = [_table(folder, bucket, count) for bucket, count in zip(geometry.buckets, repeats, strict=True)]
    write_text_file(folder / "dataset.toml", toml.dumps({**content, "datasets": tables}))


def _write_item(caches: Path, stem: str, bucket: Bucket, text_dim: int, generator: torch.Generator) -> None:
    pixels, latent = bucket.pixels, LatentShape.of(bucket.pixels)
    size = (pixels.width, pixels.height)
    window = Window(0, pixels.frames) if bucket.kind == "video" else None
    shape = (LATENT_CHANNELS, latent.frames, latent.height, latent.width)
    stamp = LatentStamp(pixels=pixels, original=size, window=window, vae="random", vae_dtype="bfloat16")
    latents = torch.randn(shape, generator=generator).to(torch.bfloat16)
    no_source = Fingerprint(size=0, mtime_ns=0, digest="random")
    write_latents(caches / str(LatentName(stem, size, window)), latents, stamp, no_source)
    text = torch.randn((TEXT_TOKENS, text_dim), generator=generator).to(torch.bfloat16)
    write_text(caches / text_name(stem), text, caption=stem, t5="random")


def _table(folder: Path, bucket: Bucket, repeats: int) -> dict[str, Any]:
    pixels = bucket.pixels
    table: dict[str, Any] = {
        f"{bucket.kind}_directory": (folder / f"{pixels}-sources").as_posix(),
        "cache_directory": _caches(folder, bucket).as_posix(),
        "resolution": [pixels.width, pixels.height],
        "batch_size": bucket.batch_size,
        "num_repeats": repeats,
    }
    if bucket.kind == "video":
        table |= {"frame_extraction": "head", "target_frames": [pixels.frames]}
    return table


def _caches(folder: Path, bucket: Bucket) -> Path:
    return folder / str(bucket.pixels)
