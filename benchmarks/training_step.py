"""Seconds per step and peak memory of the trainer on the reference mix, and whether swapping changes a single bit.

Usage: python benchmarks/training_step.py [make] [time] [batch-short] [equal] --geometry 14B --results DIR

Each stage makes what it needs first. `time` runs the trainer once per setting over a shuffled epoch of all buckets in
the proportions of the mix, as a user's run has it, because the host may be ahead of the card and what a step takes then
depends on the one before it. It shows the median of each bucket's steps after its first `--warmup` ones; the seconds of
the mix are made of means. A step's seconds are those of the step log: waiting for the batch and the step. Settings
called `peer-…` run another trainer (`peer_diffusers.py`) in their turn, and the ratios of our seconds to its seconds
are printed. `batch-short` compares tokens per second of a batch of single frames and of one clip with as many tokens.
`equal` trains the same steps with and without swapping and compares losses and gradient norms bit for bit. See
README.md beside this file.
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks import peer_diffusers
from benchmarks.figures import (
    MEASURED_ON,
    PEERS,
    Figures,
    bucket_of,
    figures_by_bucket,
    first_difference,
    largest_difference,
    mix_seconds,
    peer_ratios,
    ratio_lines,
    swap_costs,
    table,
    tokens_per_second,
)
from benchmarks.machine import conditions, machine, report_path, write_report
from benchmarks.materials import (
    GEOMETRIES,
    TEXT_TOKENS,
    Bucket,
    Materials,
    checkpoint_path,
    choose_folders,
    make_checkpoint,
    make_dataset,
    make_equal_batches,
    make_mix,
)
from benchmarks.runs import ROOT, Clock, Finished, Setting, run_trainer
from benchmarks.settings import PAIRS, SETTINGS

Measured = Mapping[str, Mapping[str, Figures]]
"""Figures by setting and bucket."""
_STAGES = ("make", "time", "batch-short", "equal")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages that were asked for; 1 if a run failed or two runs that should be equal differ."""
    options = _parser().parse_args(argv)
    clock = Clock(options.deadline)
    work, weights = (options.work, options.work) if options.work else choose_folders(options.geometry)
    print(f"{machine()}; model in {weights}, the rest in {work}", flush=True)
    _make(weights, options.geometry)
    dit = checkpoint_path(weights, options.geometry)
    timed = Materials(dit=dit, dataset=make_mix(work, options.geometry, options.warmup + options.timed))
    compared = Materials(dit=dit, dataset=make_dataset(work, options.geometry, options.equal_items))
    print(f"[{clock.elapsed:4.0f} s] model and caches are ready", flush=True)
    good = True
    if "time" in options.stages:
        good &= _time(options, timed, work, clock)
    if "batch-short" in options.stages:
        equal = Materials(dit=dit, dataset=make_equal_batches(work, options.geometry, options.warmup + options.timed))
        good &= _batch_short(options, equal, work, clock)
    if "equal" in options.stages:
        good &= _compare(options, compared, work, clock)
    return 0 if good else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", choices=_STAGES)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="14B", help="size of the transformer")
    parser.add_argument(
        "--work", type=Path, help="folder for everything that is made; default: /tmp, the model in /dev/shm"
    )
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the JSON")
    parser.add_argument(
        "--configs", type=_settings, default="reference-eager,reference,no-swap", help=f"any of {', '.join(SETTINGS)}"
    )
    parser.add_argument("--warmup", type=int, default=4, help="steps of each bucket that are not timed")
    parser.add_argument(
        "--timed", type=int, default=8, help="steps of the rarest bucket that are timed, more of the others"
    )
    parser.add_argument("--equal_items", type=int, default=3, help="steps of each bucket that are compared")
    parser.add_argument("--any_kernels", action="store_true", help="equal: do not ask for deterministic kernels")
    parser.add_argument("--deadline", type=float, default=540.0, help="seconds after which a run is stopped")
    return parser


def _settings(text: str) -> list[Setting]:
    unknown = [name for name in text.split(",") if name not in SETTINGS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no setting is called {unknown[0]}; known: {', '.join(SETTINGS)}")
    return [SETTINGS[name] for name in text.split(",")]


def _make(weights: Path, geometry: str) -> None:
    """Write the checkpoint in a process of its own where there is a card, so that this one leaves the card alone."""
    if not torch.cuda.is_available():
        make_checkpoint(weights, geometry)
        return
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        pool.submit(make_checkpoint, weights, geometry).result()


def _time(options: argparse.Namespace, materials: Materials, work: Path, clock: Clock) -> bool:
    """Measure every setting; results are written after each, so that a stop loses nothing."""
    geometry = GEOMETRIES[options.geometry]
    path = report_path(options.results, f"training-step-{options.geometry}")
    finished: list[Finished] = []
    possible = _possible(options.configs, geometry.sizes.num_layers)
    for setting in possible:
        if clock.left <= 0:
            print(f"{setting.name}: left out, time is up", flush=True)
            continue
        num_steps = (
            peer_diffusers.STEPS * len(geometry.buckets)
            if setting.peer
            else (options.warmup + options.timed) * sum(geometry.proportions)
        )
        finished.append(run_trainer(setting, options.geometry, materials, work, num_steps, clock))
        measured = _figures(finished, options.warmup)
        write_report(path, _time_report(options, finished, measured, geometry.buckets))
        print(_summary(options.geometry, finished, measured, geometry.buckets), flush=True)
    no_peer = any(setting.peer and setting not in possible for setting in options.configs)
    return not no_peer and all(run.exit_code == 0 for run in finished)


def _possible(settings: Sequence[Setting], num_layers: int) -> list[Setting]:
    """Those that can be run here; the others are named."""
    missing = peer_diffusers.missing_packages()
    possible = []
    for setting in settings:
        if setting.swapped > num_layers:
            print(f"{setting.name}: left out, the model has only {num_layers} blocks", flush=True)
        elif setting.peer and missing:
            print(f"{setting.name}: left out, {missing}", flush=True)
        else:
            possible.append(setting)
    return possible


def _figures(finished: Sequence[Finished], warmup: int) -> Measured:
    return {run.setting.name: figures_by_bucket(run.rows, run.setting.warmup(warmup)) for run in finished}


def _peers(finished: Sequence[Finished]) -> set[str]:
    return {run.setting.name for run in finished if run.setting.peer}


def _summary(geometry: str, finished: Sequence[Finished], measured: Measured, buckets: Sequence[Bucket]) -> str:
    notes = {run.setting.name: run.note for run in finished}
    labels = {run.setting.name: run.setting.label for run in finished}
    starts = [
        f"{run.setting.name}: {run.start_seconds:.1f} s to the first step, which took {run.rows[0]['seconds']:.1f} s"
        for run in finished
        if run.start_seconds is not None
    ]
    shown = table(measured, buckets, labels=labels, notes=notes, peers=geometry == "14B")
    ratios = ratio_lines(peer_ratios(measured, _peers(finished), buckets))
    return "\n".join(["", shown, *ratios, *swap_costs(measured, PAIRS, buckets), *starts, ""])


def _time_report(
    options: argparse.Namespace, finished: Sequence[Finished], measured: Measured, buckets: Sequence[Bucket]
) -> dict[str, Any]:
    runs = {
        run.setting.name: {
            "what": run.setting.label,
            "flags": run.setting.flags,
            "buckets": {bucket: asdict(figures) for bucket, figures in measured[run.setting.name].items()},
            "mix_seconds": mix_seconds(measured[run.setting.name], buckets),
            **_course(run),
        }
        for run in finished
    }
    peers = [asdict(peer) for peer in PEERS] if options.geometry == "14B" else []
    ratios = peer_ratios(measured, _peers(finished), buckets)
    return {**_conditions(options), "runs": runs, "ratios": ratios, "peers": peers, "peers_source": MEASURED_ON}


def _course(run: Finished) -> dict[str, Any]:
    """How a run went: every step, and what it printed last."""
    steps = [
        [bucket_of(row), row["seconds"], row.get("memory/peak_gib"), row["loss"], row.get("grad_norm")]
        for row in run.rows
    ]
    return {
        "exit_code": run.exit_code,
        "note": run.note,
        "total_seconds": run.total_seconds,
        "start_seconds": run.start_seconds,
        "steps": {"columns": ["bucket", "seconds", "peak_gib", "loss", "grad_norm"], "rows": steps},
        "log": run.log,
    }


def _batch_short(options: argparse.Namespace, materials: Materials, work: Path, clock: Clock) -> bool:
    """Tokens per second of every setting on a batch of first frames, and on one clip with as many tokens."""
    geometry = GEOMETRIES[options.geometry]
    buckets = geometry.equal_batches
    num_steps = (options.warmup + options.timed) * len(buckets)
    path = report_path(options.results, f"batch-short-{options.geometry}")
    runs: dict[str, Any] = {}
    good = True
    for setting in _possible([setting for setting in options.configs if not setting.peer], geometry.sizes.num_layers):
        if clock.left <= 0:
            print(f"{setting.name}: left out, time is up", flush=True)
            continue
        run = run_trainer(setting, options.geometry, materials, work, num_steps, clock)
        figures = figures_by_bucket(run.rows, options.warmup)
        rates = tokens_per_second(figures, buckets)
        by_bucket = {bucket: asdict(found) for bucket, found in figures.items()}
        runs[setting.name] = {"flags": setting.flags, "buckets": by_bucket, "tokens_per_second": rates, **_course(run)}
        write_report(path, {**_conditions(options), "batch_size": [b.batch_size for b in buckets], "runs": runs})
        good &= run.exit_code == 0
        print(f"{setting.name}: {_batch_verdict(rates, buckets)}", flush=True)
    return good


def _batch_verdict(rates: Mapping[str, float], buckets: tuple[Bucket, Bucket]) -> str:
    names = [str(bucket.pixels) for bucket in buckets]
    if any(name not in rates for name in names):
        return "not both sizes were measured"
    short, long = (rates[name] for name in names)
    return (
        f"{buckets[0].batch_size} x {names[0]} {short:.0f} tokens/s, {names[1]} {long:.0f} tokens/s, ratio "
        f"{short / long:.3f}"
    )


def _compare(options: argparse.Namespace, materials: Materials, work: Path, clock: Clock) -> bool:
    """Train the same steps without swapping, twice, and with 10 and 36 blocks swapped."""
    settings = [
        Setting(name=name, extra=f"--no_compile {swap}".strip(), deterministic=not options.any_kernels)
        for name, swap in (
            ("equal-resident", ""),
            ("equal-again", ""),
            ("equal-swap-10", "--blocks_to_swap 10"),
            ("equal-swap-36", "--blocks_to_swap 36"),
        )
    ]
    path = options.results / f"equal-{options.geometry}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}.json"
    geometry = GEOMETRIES[options.geometry]
    num_steps = options.equal_items * len(geometry.buckets)
    finished: list[Finished] = []
    verdicts: dict[str, str] = {}
    for setting in _possible(settings, geometry.sizes.num_layers):
        if clock.left <= 0:
            verdicts[setting.name] = "left out, time is up"
            continue
        finished.append(run_trainer(setting, options.geometry, materials, work, num_steps, clock))
        if len(finished) > 1:
            verdicts[setting.name] = _verdict(finished[0], finished[-1])
        runs = {run.setting.name: {"flags": run.setting.flags, **_course(run)} for run in finished}
        kernels = "any" if options.any_kernels else "deterministic"
        write_report(path, {**_conditions(options), "kernels": kernels, "verdicts": verdicts, "runs": runs})
    print("\ncompared with equal-resident, losses and gradient norms:")
    print("\n".join(f"  {name}: {verdict}" for name, verdict in verdicts.items()), flush=True)
    return all(verdict.startswith(_EQUAL) for verdict in verdicts.values()) and all(not run.note for run in finished)


_EQUAL = "equal bit for bit"


def _verdict(resident: Finished, run: Finished) -> str:
    difference = first_difference(run.rows, resident.rows)
    if difference is None and run.rows:
        return f"{_EQUAL} over {len(run.rows)} steps"
    largest = largest_difference(run.rows, resident.rows)
    return f"DIFFERENT: {difference or 'no steps'}; largest relative difference of losses {largest:.2e}"


def _conditions(options: argparse.Namespace) -> dict[str, Any]:
    """What figures have to be read with."""
    return {
        **conditions(),
        "geometry": options.geometry,
        "warmup_steps": options.warmup,
        "timed_steps": options.timed,
        "batch_size": 1,
        "text_tokens": TEXT_TOKENS,
        "timing": "between two entries of the step log, buckets shuffled",
    }


if __name__ == "__main__":
    sys.exit(main())
