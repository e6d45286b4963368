"""From step logs to figures: medians by bucket, seconds for the reference epoch, and the peers beside them."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from benchmarks.materials import Bucket
from wanlora.data.cache_files import LatentName

Rows = Sequence[Mapping[str, Any]]
"""Lines of a step log."""

_SLOW = 3
MEASURED_ON = "measured on an H100 80GB HBM3, torch 2.11.0+cu130"


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """One bucket under one setting."""

    seconds: float
    """Median of the timed steps."""
    mean: float
    """Of the same, which is what an epoch is made of, without steps of three times the median (compiling)."""
    fastest: float
    slowest: float
    peak_gib: float | None
    """The most that tensors held in a timed step; None where it was not measured."""
    num_steps: int
    """Timed steps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """Another trainer on the reference mix: seconds a step and GiB, in the order of the buckets."""

    name: str
    seconds: tuple[float, ...]
    peak_gib: tuple[float, ...] | None
    mix: float
    source: str = MEASURED_ON


PEERS = (
    Peer(
        name="musubi 0.3.4, fp8_scaled, 10 swapped (the user's flags)",
        seconds=(1.001, 0.867, 2.521, 1.421),
        peak_gib=(14.3, 13.7, 17.9, 15.3),
        mix=1615,
    ),
    Peer(
        name="musubi, fp8_scaled, no swap",
        seconds=(0.893, 0.605, 2.472, 1.299),
        peak_gib=(17.3, 16.7, 20.9, 18.3),
        mix=1469,
    ),
    Peer(
        name="musubi, fp8_scaled, 10 swapped, H2D-only, pinned",
        seconds=(0.907, 0.697, 2.493, 1.321),
        peak_gib=(14.9, 14.3, 18.6, 15.9),
        mix=1508,
    ),
    Peer(name="musubi, fp8_scaled, compile", seconds=(0.891, 0.644, 2.479, 1.297), peak_gib=None, mix=1475),
    Peer(
        name="musubi, fp8_scaled, 36 swapped",
        seconds=(1.735, 1.699, 2.583, 1.750),
        peak_gib=(5.5, 4.9, 9.2, 6.5),
        mix=2076,
    ),
    Peer(
        name="musubi, bf16, no swap", seconds=(0.732, 0.610, 2.326, 1.143), peak_gib=(29.3, 28.7, 33.0, 30.4), mix=1341
    ),
    Peer(
        name="diffusers 0.42 + peft, bf16, eager",
        seconds=(0.599, 0.438, 2.043, 0.963),
        peak_gib=(29.0, 28.2, 32.6, 30.0),
        mix=1130,
    ),
    Peer(
        name="diffusers 0.42 + peft, bf16, compile_repeated_blocks",
        seconds=(0.440, 0.283, 1.564, 0.715),
        peak_gib=(28.9, 28.2, 32.3, 29.8),
        mix=839,
    ),
)
"""Transformer of 14B with random weights, LoRA of rank 32, AdamW8bit, batch 1, everything recomputed."""


def bucket_of(row: Mapping[str, Any]) -> str:
    """Which bucket a step was on: as the row says, or by the name of its batch's first cache file."""
    if "bucket" in row:
        return str(row["bucket"])
    parsed = LatentName.parse(row["items"][0])
    assert parsed is not None
    return f"{parsed.size[0]}x{parsed.size[1]}x{parsed.window.frames if parsed.window else 1}"


def figures_by_bucket(rows: Rows, warmup: int) -> dict[str, Figures]:
    """Figures of every bucket, its first `warmup` steps left out; buckets without a timed step are absent."""
    grouped: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        grouped[bucket_of(row)].append(row)
    return {bucket: _figures(steps[warmup:]) for bucket, steps in grouped.items() if steps[warmup:]}


def _figures(rows: Rows) -> Figures:
    seconds = [row["seconds"] for row in rows]
    peaks = [row["memory/peak_gib"] for row in rows if "memory/peak_gib" in row]
    middle = median(seconds)
    return Figures(
        seconds=middle,
        mean=fmean(second for second in seconds if second <= _SLOW * middle),
        fastest=min(seconds),
        slowest=max(seconds),
        peak_gib=max(peaks, default=None),
        num_steps=len(rows),
    )


def mix_seconds(figures: Mapping[str, Figures], buckets: Iterable[Bucket]) -> float | None:
    """Seconds for an epoch of the reference mix, by means; None if a bucket was not measured."""
    try:
        return sum(bucket.per_epoch * figures[str(bucket.pixels)].mean for bucket in buckets)
    except KeyError:
        return None


def tokens_per_second(figures: Mapping[str, Figures], buckets: Iterable[Bucket]) -> dict[str, float]:
    """Video tokens of a bucket's batch by the seconds of its step; buckets without figures are absent."""
    measured = [bucket for bucket in buckets if str(bucket.pixels) in figures]
    return {str(bucket.pixels): bucket.num_tokens / figures[str(bucket.pixels)].seconds for bucket in measured}


def first_difference(ours: Rows, theirs: Rows) -> str | None:
    """Where two step logs first differ in loss, gradient norm or data, to the last bit; None if they do not."""
    for mine, other in zip(ours, theirs, strict=False):
        for key in ("step", "items", "t", "loss", "grad_norm"):
            if mine[key] != other[key]:
                return f"step {mine['step']}, {key}: {mine[key]!r} and {other[key]!r}"
    return None if len(ours) == len(theirs) else f"{len(ours)} steps and {len(theirs)} steps"


def largest_difference(ours: Rows, theirs: Rows) -> float:
    """The largest relative difference of two logs' losses."""
    pairs = zip(ours, theirs, strict=False)
    return max((abs(mine["loss"] - other["loss"]) / abs(other["loss"]) for mine, other in pairs), default=0.0)


def table(
    measured: Mapping[str, Mapping[str, Figures]],
    buckets: Sequence[Bucket],
    *,
    labels: Mapping[str, str],
    notes: Mapping[str, str],
    peers: bool,
) -> str:
    """Seconds a step and peak GiB by setting and bucket, and the mix; `peers`: with those that were measured before."""
    names = [str(bucket.pixels) for bucket in buckets]
    lines = [_line("seconds per step / peak allocated GiB", names, "mix s/epoch")]
    for name, figures in measured.items():
        cells = [_cell(figures.get(bucket)) for bucket in names]
        mix = mix_seconds(figures, buckets)
        end = "-" if mix is None else f"{mix:.0f}"
        lines.append(_line(labels[name], cells, end) + (f"  ({notes[name]})" if notes.get(name) else ""))
    for peer in PEERS if peers else ():
        gib = peer.peak_gib or [None] * len(peer.seconds)
        cells = [_pair(seconds, peak) for seconds, peak in zip(peer.seconds, gib, strict=True)]
        lines.append(_line(peer.name, cells, f"{peer.mix:.0f}"))
    return "\n".join([*lines, f"The last {len(PEERS)} rows: {MEASURED_ON}."] if peers else lines)


def peer_ratios(
    measured: Mapping[str, Mapping[str, Figures]], peers: Collection[str], buckets: Sequence[Bucket]
) -> dict[str, dict[str, float]]:
    """Seconds of each setting divided by those of each peer of the same run: by "ours / peer", by bucket and `mix`."""
    ratios: dict[str, dict[str, float]] = {}
    for peer in (name for name in measured if name in peers):
        for name in (name for name in measured if name not in peers):
            ours, theirs = measured[name], measured[peer]
            both = [str(bucket.pixels) for bucket in buckets if str(bucket.pixels) in ours.keys() & theirs.keys()]
            found = {bucket: ours[bucket].seconds / theirs[bucket].seconds for bucket in both}
            mixes = mix_seconds(ours, buckets), mix_seconds(theirs, buckets)
            if mixes[0] is not None and mixes[1] is not None:
                found["mix"] = mixes[0] / mixes[1]
            if found:
                ratios[f"{name} / {peer}"] = found
    return ratios


def ratio_lines(ratios: Mapping[str, Mapping[str, float]]) -> list[str]:
    """`peer_ratios` in words, a line each."""
    return [
        f"{pair}: " + ", ".join(f"{bucket} {ratio:.3f}" for bucket, ratio in found.items())
        for pair, found in ratios.items()
    ]


def swap_costs(
    measured: Mapping[str, Mapping[str, Figures]], pairs: Iterable[tuple[str, str]], buckets: Sequence[Bucket]
) -> list[str]:
    """What swapping costs, for each pair of settings (with, without) that was measured."""
    lines = []
    for swapped, resident in pairs:
        with_, without = measured.get(swapped, {}), measured.get(resident, {})
        both = [str(bucket.pixels) for bucket in buckets if str(bucket.pixels) in with_.keys() & without.keys()]
        costs = [f"{name} {with_[name].seconds / without[name].seconds - 1:+.1%}" for name in both]
        if costs:
            lines.append(f"{swapped} against {resident}: {', '.join(costs)}")
    return lines


def _cell(figures: Figures | None) -> str:
    return "-" if figures is None else _pair(figures.seconds, figures.peak_gib)


def _pair(seconds: float, peak_gib: float | None) -> str:
    return f"{seconds:.3f} / " + ("-" if peak_gib is None else f"{peak_gib:.1f}")


def _line(name: str, cells: Sequence[str], end: str) -> str:
    return f"{name:<64}" + "".join(f"{cell:>15}" for cell in cells) + f"{end:>13}"
