"""Seconds from starting the trainer to its first step, with and without kept fp8 weights, and where they go.

Usage: python benchmarks/start.py --geometry 14B --results DIR

Each run is the real trainer with the reference flags for one step, as a process of its own. The checkpoint lies in
memory-backed storage where it fits: what is measured is everything but the disk. The first run of a setting that keeps
weights writes them, the next reads them. Where Python has kept nothing of what it compiles of the libraries, the first
run of all has that to do, too. See README.md beside this file.
"""

import argparse
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

from benchmarks.machine import conditions, machine, report_path, write_report
from benchmarks.materials import GEOMETRIES, checkpoint_path, choose_folders, make_checkpoint, make_dataset
from benchmarks.runs import REFERENCE, ROOT, environment
from wanlora.training.metrics import read_steps

_SETTINGS = ("plain", "keep", "kept", "swapped", "kept-swapped", "fp8-fast", "keep-fp8-fast", "kept-fp8-fast")
"""From the checkpoint; the same and its fp8 weights kept; from the kept weights; the first and last with swapping; the
first three with fp8 maths, whose weights are other ones and which are measured at every start."""
_USUAL = ("plain", "keep", "kept")
_AIM, _AIM_KEPT = 20.0, 8.0
"""Seconds to the first step that are aimed for, from the checkpoint and from kept weights, files in memory."""
_LIMIT = 180
"""Seconds after which a run is given up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """One run."""

    name: str
    flags: str
    seconds: float | None
    """From starting the process to the beginning of the first step; None if there was none."""
    lines: list[tuple[float, str]]
    """What was printed, and when."""
    first_step: float | None = None
    """Seconds of the first step, kernels chosen and compiled."""

    @property
    def verdict(self) -> str:
        """How long it took and whether that is what is aimed for."""
        if self.seconds is None:
            return f"{self.name}: no step"
        aim = _AIM_KEPT if self.name.startswith("kept") else _AIM
        within = "" if self.seconds <= aim else "NOT "
        shown = f"{self.seconds:.1f} s to the first step ({within}within {aim:.0f} s)"
        return f"{self.name}: {shown}, which took {self.first_step:.1f} s"


def main(argv: Sequence[str] | None = None) -> int:
    """Start the trainer in each setting; 1 if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="14B", help="size of the transformer")
    parser.add_argument("--work", type=Path, help="folder for everything that is made; default: as training_step.py")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the JSON")
    parser.add_argument("--extra", default="--no_compile", help="flags beside the reference's")
    parser.add_argument("--settings", nargs="+", choices=_SETTINGS, default=_USUAL, help="in this order")
    parser.add_argument("--swapped", type=int, default=10, help="blocks swapped where any are")
    options = parser.parse_args(argv)
    work, weights = (options.work, options.work) if options.work else choose_folders(options.geometry)
    print(f"{machine()}; model in {weights}", flush=True)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:  # leaves the card alone in this process
        pool.submit(make_checkpoint, weights, options.geometry).result()
    dit, dataset = checkpoint_path(weights, options.geometry), make_dataset(work, options.geometry, 1)
    kept = weights / "kept"
    shutil.rmtree(kept, ignore_errors=True)
    keep, swap = f"--quantized_cache {kept}", f"--blocks_to_swap {options.swapped}"
    fast = {f"{name}fp8-fast": f"{flag} --fp8_fast" for name, flag in (("", ""), ("keep-", keep), ("kept-", keep))}
    flags = {"plain": "", "keep": keep, "kept": keep, "swapped": swap, "kept-swapped": f"{keep} {swap}", **fast}
    path, starts = report_path(options.results, f"start-{options.geometry}"), []
    for name in options.settings:
        command = [sys.executable, str(ROOT / "wan_train_network.py"), "--task", GEOMETRIES[options.geometry].task]
        command += ["--dit", str(dit), "--dataset_config", str(dataset), "--max_train_steps", "1", *REFERENCE.split()]
        starts.append(_start(name, f"{flags[name]} {options.extra}", command, work / "output"))
        write_report(path, {**conditions(), "geometry": options.geometry, "runs": [asdict(start) for start in starts]})
    shutil.rmtree(kept, ignore_errors=True)
    print("", *(start.verdict for start in starts), sep="\n", flush=True)
    return 0 if all(start.seconds for start in starts) else 1


def _start(name: str, flags: str, command: list[str], output: Path) -> Start:
    shutil.rmtree(output, ignore_errors=True)
    command = [*command, *flags.split(), "--output_dir", str(output), "--output_name", "run"]
    command += ["--logging_dir", str(output / "logs")]
    begin = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    lines: list[tuple[float, str]] = []
    reader = threading.Thread(target=_stamp, args=(process, begin, lines), daemon=True)
    reader.start()
    seconds, first_step = _wait(process, begin, output / "run-steps.jsonl")
    reader.join(5)
    start = Start(name=name, flags=flags, seconds=seconds, first_step=first_step, lines=lines)
    print(start.verdict, *(f"    {at:6.1f}  {line}" for at, line in lines), sep="\n", flush=True)
    return start


def _stamp(process: "subprocess.Popen[str]", begin: float, lines: list[tuple[float, str]]) -> None:
    """Note when each line was printed, progress bars left out."""
    assert process.stdout is not None
    for line in process.stdout:
        text = line.rstrip().rsplit("\r", 1)[-1]
        if text and "%|" not in text:
            lines.append((round(time.monotonic() - begin, 2), text))


def _wait(process: "subprocess.Popen[str]", begin: float, steps: Path) -> tuple[float | None, float | None]:
    """When the first step began and how long it took; the process is stopped after it."""
    while process.poll() is None and time.monotonic() - begin < _LIMIT:
        time.sleep(0.05)
        rows = read_steps(steps) if steps.is_file() and steps.stat().st_size else []
        if rows:
            seconds = time.monotonic() - begin
            process.kill()
            process.wait()
            return seconds - rows[0]["seconds"], rows[0]["seconds"]
    process.kill()
    process.wait()
    return None, None


if __name__ == "__main__":
    sys.exit(main())
