"""A plan in words and as JSON."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from wanlora.foundation.dtypes import dtype_name
from wanlora.foundation.shapes import LatentShape
from wanlora.memory.measure import GIB
from wanlora.memory.outlook import Outlook
from wanlora.training.plan import PREVIEWS, TEXT_ENCODER, BucketPlan, RunPlan

_PREVIEW_CURES = {
    TEXT_ENCODER: "add --fp8_t5, or leave out --sample_prompts",
    PREVIEWS: "make them smaller or shorter, add --vae_dtype bfloat16, or swap more blocks",
}
_SLOW_HOST = 0.0085
"""Seconds in which a slow host queued the kernels of a block (benchmarks/results/block-step-14B-*.json)."""
_MINUTE, _HOUR, _DAY = 60, 3600, 86400


def plan_lines(plan: RunPlan, *, steps: int, epochs: float, processes: int = 1) -> list[str]:
    """What there is to tell: `steps` an epoch, `epochs` to go, batches shared by `processes`."""
    return [
        *_table(plan),
        *_legend(plan),
        *_time(plan, steps=steps, epochs=epochs, processes=processes),
        *_memory(plan),
        *_verdict(plan),
    ]


def _table(plan: RunPlan) -> Iterator[str]:
    total, room = plan.target.total, plan.target.room
    usable = f", {_gib(total)} GiB of which {_gib(room)} can be used" if total is not None and room is not None else ""
    yield f"plan for {plan.target.name}{usable}:"
    head = ("size", "batch", "samples", "batches", "tokens", "PFLOP", "needs GiB", "swapped", "kept", "s/batch")
    rows = [head, *(_row(bucket) for bucket in plan.buckets)]
    shown = [column for column, name in enumerate(head) if name != "swapped" or plan.outlook.by_size]
    table = [tuple(row[column] for column in shown) for row in rows]
    widths = [max(map(len, cells)) for cells in zip(*table, strict=True)]
    for row in table:
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        yield "  " + "  ".join((first.strip().ljust(widths[0]), *others))


def _row(bucket: BucketPlan) -> tuple[str, ...]:
    seconds = "" if bucket.seconds is None else f"{bucket.seconds:.2f}"
    return (
        str(bucket.pixels),
        str(bucket.batch),
        str(bucket.samples),
        str(bucket.batches),
        str(bucket.load.tokens * bucket.batch),
        f"{bucket.flops / 1e15:.2f}",
        _gib(bucket.peak),
        str(bucket.swapped),
        f"{bucket.kept.blocks}+{bucket.kept.attention}" if bucket.kept.attention else str(bucket.kept.blocks),
        seconds,
    )


def _legend(plan: RunPlan) -> Iterator[str]:
    outlook = plan.outlook
    whole = outlook.kept.blocks
    blocks = f"{outlook.num_blocks - whole} blocks" if whole else "every block"
    needs = f"needs: with {blocks} recomputed in backward" if whole < outlook.num_blocks else "needs: at the peak"
    if outlook.by_size:
        needs += "; swapped: blocks whose memory is freed for that size"
    kept = f"; kept: blocks of {outlook.num_blocks} that the rest of the memory spares from it"
    if any(bucket.kept.attention for bucket in plan.buckets):
        kept += ", + blocks that keep the result of attention"
    yield f"  ({needs}{kept if plan.target.room is not None and outlook.recompute else ''})"
    host = _SLOW_HOST * outlook.num_blocks
    if any(bucket.seconds is not None and bucket.seconds < host for bucket in plan.buckets):
        unless = "see --compile_cpp_wrapper" if outlook.swapped else "where they are not replayed: see --cuda_graphs"
        yield f"  (s/batch: of the card; a slow processor may need {host:.2f} s a batch to queue the kernels, {unless})"


def _time(plan: RunPlan, *, steps: int, epochs: float, processes: int) -> Iterator[str]:
    tokens = sum(bucket.batches * bucket.batch * bucket.load.tokens for bucket in plan.buckets)
    flops = sum(bucket.batches * bucket.flops for bucket in plan.buckets)
    text = f"an epoch: {steps} steps, {tokens / 1e6:.2f} million tokens, {flops / 1e15:.3g} PFLOP"
    if plan.epoch_seconds is None or plan.target.rates is None:
        yield text
        return
    share = plan.epoch_seconds / processes
    run = share * epochs
    yield (
        f"{text}, about {duration(share)}; the run: about {duration(run)} (an estimate from the rates of the card "
        f"{plan.target.rates.name}; previews, validation and saving not counted)"
    )


def _memory(plan: RunPlan) -> Iterator[str]:
    largest, outlook = plan.largest, plan.outlook
    parts = outlook.resting(largest.load) | outlook.step(largest.load)
    where = "on the card" if plan.target.total is not None or plan.target.streams else "in memory"
    yield f"{where} at {largest.pixels}: {_sum(parts)}; weights in {_formats(outlook)}"
    for name, size in plan.other_peaks.items():
        yield f"{where} for the {name}: {_gib(size)} GiB"
    free = plan.target.host_free
    yield f"system memory: about {_sum(plan.host)}{'' if free is None else f'; {_gib(free)} are free'}"
    disk = plan.disk
    yield (
        f"disk: latents {_size(disk.latents)} ({_size(disk.latents_there)} are there), text "
        f"{'' if disk.text == disk.text_there else 'at most '}{_size(disk.text)} ({_size(disk.text_there)} are there)"
    )


def _verdict(plan: RunPlan) -> Iterator[str]:
    room, free, host = plan.target.room, plan.target.host_free, sum(plan.host.values())
    if free is not None and host > free:
        yield f"too much system memory: about {_gib(host)} of {_gib(free)} GiB; swap fewer blocks, close other programs"
    if room is None:
        return
    for name, size in plan.other_peaks.items():
        if size > room:
            yield f"too much for the {name}: {_gib(size)} of {_gib(room)} GiB; {_PREVIEW_CURES[name]}"
    if plan.fits:
        yield f"it fits: {plan.largest.pixels} needs {_gib(plan.largest.peak)} of {_gib(room)} GiB"
        for flags, spared in plan.faster.items():
            yield f"foretold to be faster: {flags}, {spared:.0%} less time"
        return
    failing = [bucket for bucket in plan.buckets if bucket.peak > room]
    names = ", ".join(f"{bucket.pixels} ({_gib(bucket.peak)})" for bucket in failing)
    yield f"it does not fit: of the {_gib(room)} GiB that can be used, too much is needed by {names}. What would fit:"
    found = False
    for flags, outlook in plan.cures.items():
        found = True
        yield f"  {flags}: {_gib(outlook.peak(plan.largest.load))} GiB{_slower(plan, outlook)}"
    if smaller := smaller_clip(plan):
        found = True
        yield f"  {smaller}"
    if not found:
        yield "  nothing that can be changed here; a smaller size, a smaller model or a card with more memory"


def smaller_clip(plan: RunPlan) -> str:
    """The most frames, or samples a batch, with which the largest size would fit as things are set; or nothing."""
    largest, room = plan.largest, plan.target.room
    assert room is not None
    for batch in range(largest.batch - 1, 0, -1):
        load = replace(largest.load, batch=batch)
        if plan.outlook.peak(load) <= room:
            return f"batch_size = {batch} for {largest.pixels}: {_gib(plan.outlook.peak(load))} GiB"
    for frames in range(largest.pixels.frames - 4, 0, -4):
        pixels = replace(largest.pixels, frames=frames)
        load = replace(largest.load, tokens=LatentShape.of(pixels).num_tokens, batch=1)
        if plan.outlook.peak(load) <= room:
            return (
                f"{frames} instead of {largest.pixels.frames} frames at this size: {_gib(plan.outlook.peak(load))} GiB"
            )
    return ""


def _slower(plan: RunPlan, outlook: Outlook) -> str:
    card, room = plan.target.rates, plan.target.room
    if card is None or room is None:
        return ""
    load = plan.largest.load
    return f", about {outlook.seconds(load, card, kept=outlook.most_kept(load, room)):.2f} s a batch"


def _formats(outlook: Outlook) -> str:
    compute = dtype_name(outlook.maths.compute)
    products = "fp8 and " if outlook.fp8_products else ""
    return f"fp8, maths in {products}{compute}" if outlook.maths.fp8 else compute


def _sum(parts: Mapping[str, int]) -> str:
    """`weights 10.9 + LoRA 0.6 = 11.5 GiB`."""
    named = [(name, size) for name, size in parts.items() if size]
    total = _gib(sum(size for _, size in named))
    return " + ".join(f"{name} {_gib(size)}" for name, size in named) + f" = {total} GiB"


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}"


def _size(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size > GIB else f"{size / 2**20:.1f} MiB"


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3.5 h`, `4.2 days`."""
    if seconds < 2 * _MINUTE:
        return f"{seconds:.0f} s"
    if seconds < 2 * _HOUR:
        return f"{seconds / _MINUTE:.0f} min"
    if seconds < 2 * _DAY:
        return f"{seconds / _HOUR:.1f} h"
    return f"{seconds / _DAY:.1f} days"


def plan_record(plan: RunPlan) -> dict[str, Any]:
    """Everything in the plan as plain values; sizes in bytes."""
    outlook, target = plan.outlook, plan.target
    return {
        "target": {
            "name": target.name,
            "total_bytes": target.total,
            "usable_bytes": target.room,
            "host_free_bytes": target.host_free,
        },
        "fits": plan.fits,
        "settings": {
            "blocks_to_swap": outlook.swapped,
            "recompute": outlook.recompute,
            "fp8": outlook.maths.fp8,
            "compiled": outlook.maths.compiled,
            "trained_numbers": outlook.trained,
        },
        "buckets": [_bucket_record(plan, bucket) for bucket in plan.buckets],
        "epoch_seconds": plan.epoch_seconds,
        "card_bytes": outlook.resting(plan.largest.load) | outlook.step(plan.largest.load),
        "other_peak_bytes": plan.other_peaks,
        "host_bytes": plan.host,
        "disk_bytes": {name: getattr(plan.disk, name) for name in ("latents", "latents_there", "text", "text_there")},
        "would_fit": {flags: outlook.peak(plan.largest.load) for flags, outlook in plan.cures.items()},
        "faster": plan.faster,
    }


def _bucket_record(plan: RunPlan, bucket: BucketPlan) -> dict[str, Any]:
    return {
        "width": bucket.pixels.width,
        "height": bucket.pixels.height,
        "frames": bucket.pixels.frames,
        "batch_size": bucket.batch,
        "samples": bucket.samples,
        "batches": bucket.batches,
        "tokens_per_sample": bucket.load.tokens,
        "flops": bucket.flops,
        "peak_bytes": bucket.peak,
        "blocks_swapped": bucket.swapped,
        "blocks_kept": bucket.kept.blocks,
        "attention_kept": bucket.kept.attention,
        "everything_kept": bucket.kept.everything,
        "seconds": bucket.seconds,
        "fits": None if plan.target.room is None else bucket.peak <= plan.target.room,
    }
