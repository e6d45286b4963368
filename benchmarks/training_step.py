"""Seconds per step and peak memory of the trainer on the reference mix, and whether swapping changes a single bit.

Usage: python benchmarks/training_step.py [make] [time] [equal] --geometry 14B --results DIR

Each stage makes what it needs first. `time` runs the trainer once per setting over a shuffled epoch of all buckets, as
a user's run has it, and takes the median of each bucket's steps after its first few. A step's seconds are those of the
step log: waiting for the batch and the step. `equal` trains the same
steps with and without swapping and compares losses and gradient norms bit for bit. See README.md beside this file.
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

from benchmarks.figures import (
    MEASURED_ON,
    PEERS,
    Figures,
    bucket_of,
    figures_by_bucket,
    first_difference,
    largest_difference,
    mix_seconds,
    swap_costs,
    table,
)
from benchmarks.machine import conditions, machine, write_report
from benchmarks.materials import (
    GEOMETRIES,
    TEXT_TOKENS,
    Bucket,
    Materials,
    checkpoint_path,
    choose_folders,
    make_checkpoint,
    make_dataset,
)
from benchmarks.runs import ROOT, Clock, Finished, Setting, run_trainer

_FP8 = ("--fp8_base", "--fp8_scaled")
_KEEP = "--activation_memory auto"
SETTINGS: dict[str, Setting] = {
    setting.name: setting
    for setting in (
        Setting(name="reference-eager", extra="--blocks_to_swap 10 --no_compile"),
        Setting(name="reference", extra="--blocks_to_swap 10"),
        Setting(name="no-swap", extra=""),
        Setting(name="no-swap-eager", extra="--no_compile"),
        Setting(name="swap-36", extra="--blocks_to_swap 36"),
        Setting(name="swap-36-eager", extra="--blocks_to_swap 36 --no_compile"),
        Setting(name="bf16-no-swap", without=_FP8),
        Setting(name="fp8-fast", extra="--fp8_fast"),
        Setting(name="fp8-fast-swap-10", extra="--fp8_fast --blocks_to_swap 10"),
        Setting(name="fp8-fast-swap-36", extra="--fp8_fast --blocks_to_swap 36"),
        Setting(name="keep", extra=_KEEP),
        Setting(name="keep-cap-24", extra=f"{_KEEP} --vram_limit 24"),
        Setting(name="keep-bf16", extra=_KEEP, without=_FP8),
        Setting(name="keep-fp8-fast", extra=f"{_KEEP} --fp8_fast"),
        Setting(name="keep-fp8-fast-cap-24", extra=f"{_KEEP} --fp8_fast --vram_limit 24"),
        Setting(name="reference-bf16-residual", extra="--blocks_to_swap 10 --residual_dtype bfloat16"),
        Setting(name="no-swap-bf16-residual", extra="--residual_dtype bfloat16"),
        Setting(name="swap-36-bf16-residual", extra="--blocks_to_swap 36 --residual_dtype bfloat16"),
    )
}
"""What `--configs` names."""
PAIRS = (
    ("reference", "no-swap"),
    ("reference-eager", "no-swap-eager"),
    ("swap-36", "no-swap"),
    ("swap-36-eager", "no-swap-eager"),
    ("reference-bf16-residual", "no-swap-bf16-residual"),
    ("swap-36-bf16-residual", "no-swap-bf16-residual"),
)
"""Settings that differ in swapping alone."""
_STAGES = ("make", "time", "equal")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages that were asked for; 1 if a run failed or two runs that should be equal differ."""
    options = _parser().parse_args(argv)
    clock = Clock(options.deadline)
    work, weights = (options.work, options.work) if options.work else choose_folders(options.geometry)
    print(f"{machine()}; model in {weights}, the rest in {work}", flush=True)
    _make(weights, options.geometry)
    dit = checkpoint_path(weights, options.geometry)
    timed = Materials(dit=dit, dataset=make_dataset(work, options.geometry, options.warmup + options.timed))
    compared = Materials(dit=dit, dataset=make_dataset(work, options.geometry, options.equal_items))
    print(f"[{clock.elapsed:4.0f} s] model and caches are ready", flush=True)
    good = True
    if "time" in options.stages:
        good &= _time(options, timed, work, clock)
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
    parser.add_argument("--timed", type=int, default=8, help="steps of each bucket that are timed")
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
    num_steps = (options.warmup + options.timed) * len(geometry.buckets)
    path = options.results / f"training-step-{options.geometry}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}.json"
    finished: list[Finished] = []
    for setting in _possible(options.configs, geometry.sizes.num_layers):
        if clock.left <= 0:
            print(f"{setting.name}: left out, time is up", flush=True)
            continue
        finished.append(run_trainer(setting, options.geometry, materials, work, num_steps, clock))
        measured = {run.setting.name: figures_by_bucket(run.rows, options.warmup) for run in finished}
        write_report(path, _time_report(options, finished, measured, geometry.buckets))
        print(_summary(options.geometry, finished, measured, geometry.buckets), flush=True)
    return all(run.exit_code == 0 for run in finished)


def _possible(settings: Sequence[Setting], num_layers: int) -> list[Setting]:
    for setting in settings:
        if setting.swapped > num_layers:
            print(f"{setting.name}: left out, the model has only {num_layers} blocks", flush=True)
    return [setting for setting in settings if setting.swapped <= num_layers]


def _summary(
    geometry: str,
    finished: Sequence[Finished],
    measured: Mapping[str, Mapping[str, Figures]],
    buckets: Sequence[Bucket],
) -> str:
    notes = {run.setting.name: run.note for run in finished}
    starts = [
        f"{run.setting.name}: {run.start_seconds:.1f} s to the first step, which took {run.rows[0]['seconds']:.1f} s"
        for run in finished
        if run.start_seconds is not None
    ]
    shown = table(measured, buckets, notes=notes, peers=geometry == "14B")
    return "\n".join(["", shown, *swap_costs(measured, PAIRS, buckets), *starts, ""])


def _time_report(
    options: argparse.Namespace,
    finished: Sequence[Finished],
    measured: Mapping[str, Mapping[str, Figures]],
    buckets: Sequence[Bucket],
) -> dict[str, Any]:
    runs = {
        run.setting.name: {
            "flags": run.setting.flags,
            "buckets": {bucket: asdict(figures) for bucket, figures in measured[run.setting.name].items()},
            "mix_seconds": mix_seconds(measured[run.setting.name], buckets),
            **_course(run),
        }
        for run in finished
    }
    peers = [asdict(peer) for peer in PEERS] if options.geometry == "14B" else []
    return {**_conditions(options), "runs": runs, "peers": peers, "peers_source": MEASURED_ON}


def _course(run: Finished) -> dict[str, Any]:
    """How a run went: every step, and what it printed last."""
    steps = [
        [bucket_of(row), row["seconds"], row.get("memory/peak_gib"), row["loss"], row["grad_norm"]] for row in run.rows
    ]
    return {
        "exit_code": run.exit_code,
        "note": run.note,
        "total_seconds": run.total_seconds,
        "start_seconds": run.start_seconds,
        "steps": {"columns": ["bucket", "seconds", "peak_gib", "loss", "grad_norm"], "rows": steps},
        "log": run.log,
    }


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
