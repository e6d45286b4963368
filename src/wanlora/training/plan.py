"""What a run will need, told before anything expensive happens: `wanlora plan` and `--dry_run`.

Made of what the checks have found (headers, the data's plan, the settings) and of `memory/outlook.py`. No model is read
and no card is needed; where a card is named or present, the needs are held against what it has.
"""

import os
from collections import Counter
from dataclasses import dataclass

import torch

from wanlora.config.train import ModelConfig, TrainConfig
from wanlora.data.plan import DataPlan
from wanlora.foundation.dtypes import parse_dtype
from wanlora.foundation.shapes import LatentShape, PixelShape
from wanlora.foundation.tensor_files import open_tensors
from wanlora.memory.cards import Card
from wanlora.memory.checkpointing import Kept
from wanlora.memory.choices import cures, faster
from wanlora.memory.footprint import ADAPTABLE, BlockMaths
from wanlora.memory.outlook import Load, Outlook
from wanlora.memory.previews import decoder_bytes, sampling_bytes, text_encoder_bytes
from wanlora.memory.resting import WeightFormats, linear_sizes
from wanlora.quantization.installer import Mode
from wanlora.training.build import activation_bytes, residual_dtype
from wanlora.training.optimizers import state_bytes
from wanlora.training.prepare import Prepared

TEXT_ENCODER, PREVIEWS = "text encoder for previews", "previews"
_STORED, _HEADER = 2, 1024
"""Bytes of a number and of the rest of a cache file."""
_CHANNELS, _LONGEST_TEXT = 16, 512
_PROGRAM, _WORKER = 3 * 2**30, 2**29
"""System memory of Python with PyTorch and CUDA, and of each process that reads batches. From experience."""
_USABLE_HOST_MEMORY, _LOCKABLE = 0.8, 0.5
"""Parts of the free system memory that a run may take, and that can be page-locked (Windows: half of all)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """Where a run is to take place."""

    name: str
    total: int | None = None
    """Bytes that the card has; None where there is none."""
    room: int | None = None
    """Bytes that tensors can be expected to hold of them."""
    rates: Card | None = None
    """What the card can do, if it is known."""
    compiled: bool = False
    """Blocks are compiled there."""
    fp8: Mode | None = None
    """How weights are kept in fp8 there; with `rows` they are also multiplied so."""
    streams: bool = True
    """Blocks can be streamed to it."""
    host_free: int | None = None
    """Bytes of system memory that are free there, if that is known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BucketPlan:
    """What samples of one size need."""

    pixels: PixelShape
    batch: int
    samples: int
    """An epoch, repeats included."""
    batches: int
    """An epoch."""
    load: Load
    peak: int
    """Bytes on the card."""
    swapped: int
    """Blocks whose memory is freed meanwhile."""
    kept: Kept
    """What need not be recomputed."""
    flops: float
    """Of a batch."""
    seconds: float | None
    """Of a batch; None where the card's rates are not known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Disk:
    """Cache files, bytes."""

    latents: int
    latents_there: int
    text: int
    """With the longest texts that there can be for captions that are not cached."""
    text_there: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPlan:
    """What a run will need."""

    target: Target
    outlook: Outlook
    buckets: tuple[BucketPlan, ...]
    """The largest last."""
    other_peaks: dict[str, int]
    """Bytes on the card of what is not training, by what it is."""
    host: dict[str, int]
    """Bytes of system memory, by what holds them."""
    disk: Disk
    cures: dict[str, Outlook]
    """Settings that fit, by the flags to type; empty if these fit or nothing does."""
    faster: dict[str, float]
    """Where these fit: settings that are foretold to be faster, by the flags to type, with the part of the time that
    they spare."""

    @property
    def largest(self) -> BucketPlan:
        """The size that needs most."""
        return max(self.buckets, key=lambda bucket: bucket.peak)

    @property
    def fits(self) -> bool | None:
        """Whether every size fits; None where there is no card to fit."""
        return None if self.target.room is None else self.largest.peak <= self.target.room

    @property
    def epoch_seconds(self) -> float | None:
        """About how long an epoch takes on one card."""
        times = [bucket.seconds * bucket.batches for bucket in self.buckets if bucket.seconds is not None]
        return sum(times) if len(times) == len(self.buckets) else None


def make_plan(config: TrainConfig, prepared: Prepared, target: Target, *, dtype: torch.dtype) -> RunPlan:
    """The plan of a run on `target` with maths in `dtype`."""
    outlook = make_outlook(config, prepared, target, dtype=dtype)
    counts = count_buckets(prepared.plan)
    buckets = [_bucket(outlook, target, pixels, batch, *number) for (pixels, batch), number in counts.items()]
    buckets.sort(key=lambda bucket: bucket.peak)
    loads = [bucket.load for bucket in buckets]
    room, batches = target.room, batches_of(prepared.plan)
    fits = room is None or outlook.peak(loads[-1]) <= room
    spared, solutions = {}, {}
    if room is not None and target.streams:
        host = host_for_blocks(config, prepared, target)
        if not fits:
            solutions = cures(outlook, batches, room, target.rates, host=host)
        elif target.rates:
            besides = drawing_bytes(config.model, prepared, outlook)
            spared = faster(outlook, batches, room, target.rates, besides=besides, host=host)
    return RunPlan(
        target=target,
        outlook=outlook,
        buckets=tuple(buckets),
        other_peaks=_other_peaks(config.model, prepared, outlook),
        host=_host(config, prepared, outlook, loads, target),
        disk=_disk(prepared.plan, prepared.transformer.sizes.text_dim),
        cures=solutions,
        faster=spared,
    )


def make_outlook(config: TrainConfig, prepared: Prepared, target: Target, *, dtype: torch.dtype) -> Outlook:
    """The settings of a run as memory and time depend on them; `auto` swaps and transposes nothing yet."""
    memory, file = config.memory, prepared.transformer
    ranks = prepared.ranks or dict.fromkeys(prepared.targets, config.network.rank)
    sizes = {target: linear_sizes(file.sizes)[target.split(".", 2)[2]] for target in prepared.targets}
    fp8 = target.fp8 is not None
    islands = file.dtypes[0] if file.dtypes[0].itemsize == 2 else torch.float32
    return Outlook(
        maths=BlockMaths(
            sizes=file.sizes,
            compute=dtype,
            residual=residual_dtype(memory),
            compiled=target.compiled and memory.compile_backend == "inductor",  # others leave blocks as they are
            fp8=fp8,
            rank=max(ranks.values()),
            narrow=prepared.optimizer.treats_numbers_alone and dtype.itemsize < 4,
            adapted=[name for name in ADAPTABLE if any(target.endswith(f".{name}") for target in prepared.targets)],
            text_rows=file.sizes.text_len,
        ),
        formats=WeightFormats(compute=dtype, fp8=fp8, scales=target.fp8 or "scaled", islands=islands),
        trained=sum(ranks[target] * sum(sizes[target]) for target in prepared.targets),
        state_bytes=state_bytes(prepared.optimizer),
        swapped=memory.num_swapped if target.streams else 0,
        by_size=prepared.swapped,
        ring=memory.block_swap_ring_size,
        recompute=memory.gradient_checkpointing,
        activations=activation_bytes(memory),
        offload=memory.gradient_checkpointing_cpu_offload and memory.gradient_checkpointing,
        accumulates=config.run.gradient_accumulation_steps > 1,
        fp8_products=target.fp8 == "rows",
        transposed=target.fp8 == "rows" and memory.fp8_fast_transposed == "on",
        copied=prepared.optimizer.treats_numbers_alone and config.network.scale_weight_norms is None,
    )


def count_buckets(plan: DataPlan) -> dict[tuple[PixelShape, int], tuple[int, int]]:
    """Samples and batches an epoch, by size and the largest batch of it."""
    samples: Counter[tuple[PixelShape, int]] = Counter()
    batches: Counter[tuple[PixelShape, int]] = Counter()
    for dataset in plan.datasets:
        for pixels, count in dataset.buckets.items():
            key = (pixels, min(dataset.config.batch_size, count))
            samples[key] += count
            batches[key] += -(-count // dataset.config.batch_size)
    return {key: (samples[key], batches[key]) for key in samples}


def batches_of(plan: DataPlan) -> dict[Load, int]:
    """How many batches of every size an epoch has, the last of an epoch taken for whole."""
    counts: Counter[Load] = Counter()
    for (pixels, batch), (_, batches) in count_buckets(plan).items():
        counts[Load(tokens=LatentShape.of(pixels).num_tokens, batch=batch)] += batches
    return dict(counts)


def _bucket(outlook: Outlook, target: Target, pixels: PixelShape, batch: int, samples: int, batches: int) -> BucketPlan:
    load = Load(tokens=LatentShape.of(pixels).num_tokens, batch=batch)
    kept = outlook.kept if target.room is None else outlook.most_kept(load, target.room)
    return BucketPlan(
        pixels=pixels,
        batch=batch,
        samples=samples,
        batches=batches,
        load=load,
        peak=outlook.peak(load),
        swapped=outlook.swapped_for(load),
        kept=kept,
        flops=outlook.flops(load, kept=kept).total,
        seconds=outlook.seconds(load, target.rates, kept=kept) if target.rates else None,
    )


def _other_peaks(model: ModelConfig, prepared: Prepared, outlook: Outlook) -> dict[str, int]:
    """The making of previews, if there are any."""
    if not prepared.requests or model.t5 is None:
        return {}
    with open_tensors(model.t5) as source:
        text = text_encoder_bytes(source, fp8=model.fp8_t5)
    resting = sum(outlook.resting().values())
    return {TEXT_ENCODER: text, PREVIEWS: resting + drawing_bytes(model, prepared, outlook)}


def drawing_bytes(model: ModelConfig, prepared: Prepared, outlook: Outlook) -> int:
    """Bytes that previews take beside what rests on the card; 0 without previews."""
    if not prepared.requests or model.vae is None:
        return 0
    itemsize, tiled = parse_dtype(model.vae_dtype or "float32").itemsize, model.vae_tiling != "off"
    with open_tensors(model.vae) as source:
        return max(
            max(
                sampling_bytes(outlook.maths, request.pixels),
                decoder_bytes(source, request.pixels, itemsize=itemsize, tiled=tiled),
            )
            for request in prepared.requests
        )


def host_for_blocks(config: TrainConfig, prepared: Prepared, target: Target) -> int | None:
    """Bytes of system memory that may be page-locked by this process; None where it is not known."""
    if target.host_free is None:
        return None
    share = target.host_free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    others = sum(_host_besides(config, prepared).values())
    return max(min(int(_USABLE_HOST_MEMORY * share) - others, int(_LOCKABLE * share)), 0)


def _host(
    config: TrainConfig, prepared: Prepared, outlook: Outlook, loads: list[Load], target: Target
) -> dict[str, int]:
    """System memory, roughly."""
    needs = _host_besides(config, prepared)
    if target.total is None:
        needs["training"] = outlook.peak(loads[-1])
    else:
        needs["swapped blocks"] = outlook.host
        needs["inputs of blocks"] = max(outlook.offloaded(load) for load in loads)
    return {name: size for name, size in needs.items() if size}


def _host_besides(config: TrainConfig, prepared: Prepared) -> dict[str, int]:
    """System memory that is taken whatever trains where."""
    workers = min(config.run.max_data_loader_n_workers, os.cpu_count() or 1)
    needs = {"program": _PROGRAM, "reading batches": workers * _WORKER}
    if prepared.requests and config.model.vae is not None:
        needs["VAE for previews"] = config.model.vae.stat().st_size
    return needs


def _disk(plan: DataPlan, text_dim: int) -> Disk:
    """What caching writes for a whole dataset file, and what of it is there."""
    latents = {item.latent_path: _latent_bytes(item.pixels) for item in plan.cached_items}
    texts = {item.text_path for item in plan.cached_items}
    there = {path: path.stat().st_size for path in texts if path.is_file()}
    return Disk(
        latents=sum(latents.values()),
        latents_there=sum(path.stat().st_size for path in latents if path.is_file()),
        text=sum(there.values()) + (len(texts) - len(there)) * _LONGEST_TEXT * text_dim * _STORED,
        text_there=sum(there.values()),
    )


def _latent_bytes(pixels: PixelShape) -> int:
    latent = LatentShape.of(pixels)
    return _HEADER + _STORED * _CHANNELS * latent.frames * latent.height * latent.width
