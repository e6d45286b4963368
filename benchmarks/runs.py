"""Starting the trainer as a process of its own and reading its step log while it runs."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from benchmarks import peer_diffusers
from benchmarks.figures import bucket_of
from benchmarks.materials import GEOMETRIES, Materials
from wanlora.training.metrics import read_steps

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = (
    "--sdpa --mixed_precision bf16 --fp8_base --fp8_scaled --optimizer_type adamw8bit --learning_rate 5e-5 "
    "--gradient_checkpointing --max_data_loader_n_workers 2 --persistent_data_loader_workers "
    "--network_module networks.lora_wan --network_dim 32 --network_alpha 32 --timestep_sampling shift "
    "--discrete_flow_shift 3.0 --save_every_n_epochs 1 --save_state --seed 2025 --log_config --log_with tensorboard"
)
"""The flags of the reference run but for swapping, files, length and previews. As in the peers, every block is
recomputed unless a setting says otherwise."""
_POLL_SECONDS = 0.1
_REPORT_SECONDS = 10.0
_GRACE_SECONDS = 20.0
_LOG_LINES = 60
_STEP_LOG = "run-steps.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """A way to run the trainer."""

    name: str
    extra: str = ""
    """Flags after the reference flags."""
    without: tuple[str, ...] = ()
    """Reference flags that are left out."""
    deterministic: bool = False
    peer: str = ""
    """Not this trainer but peer_diffusers.py, in this mode."""

    @property
    def flags(self) -> list[str]:
        """The flags that decide speed and memory."""
        if self.peer:
            return [self.peer]
        return [flag for flag in REFERENCE.split() if flag not in self.without] + self.extra.split()

    @property
    def difference(self) -> str:
        """What is run, in words."""
        if self.peer:
            return peer_diffusers.title(self.peer)
        parts = [*(f"without {flag}" for flag in self.without), f"with {self.extra}" if self.extra else "alone"]
        return f"the reference flags {' '.join(parts)}"

    @property
    def label(self) -> str:
        """Its row's name in a table."""
        return peer_diffusers.title(self.peer) if self.peer else f"wanlora {self.name}"

    def warmup(self, ours: int) -> int:
        """How many steps of each bucket are not timed; `ours` for this trainer."""
        return peer_diffusers.WARMUP if self.peer else ours

    @property
    def swapped(self) -> int:
        """Blocks that stay in system memory at least: with `auto` the run chooses."""
        words = self.extra.split()
        number = words[words.index("--blocks_to_swap") + 1] if "--blocks_to_swap" in words else "0"
        return 0 if number == "auto" else int(number)


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """A run of the trainer that has ended."""

    setting: Setting
    rows: list[dict[str, Any]]
    """The step log."""
    exit_code: int
    total_seconds: float
    start_seconds: float | None
    """From starting the process to the beginning of the first step."""
    stopped: bool
    """It was ended because time was up."""
    log: list[str]
    """The last lines it printed, progress bars left out."""

    @property
    def note(self) -> str:
        """What went wrong, in a few words; empty if nothing did."""
        if self.stopped:
            return f"stopped after {len(self.rows)} steps: time was up"
        return f"exit code {self.exit_code} after {len(self.rows)} steps" if self.exit_code else ""


class Clock:
    """How much time is left for the whole command."""

    def __init__(self, limit: float) -> None:
        self.begin = time.monotonic()
        self.limit = limit

    @property
    def elapsed(self) -> float:
        """Seconds since the command began."""
        return time.monotonic() - self.begin

    @property
    def left(self) -> float:
        """Seconds that remain."""
        return self.limit - self.elapsed


def run_trainer(
    setting: Setting, geometry: str, materials: Materials, work: Path, num_steps: int, clock: Clock
) -> Finished:
    """Train `num_steps` steps (a peer takes as many as it always does); end early when the clock has run out.

    Prints a line every few seconds.
    """
    output = work / "output" / setting.name
    steps_file = output / _STEP_LOG
    steps_file.unlink(missing_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    log_path = output / "console.txt"
    print(f"[{clock.elapsed:4.0f} s] {setting.name}: {setting.difference}", flush=True)
    with log_path.open("w", encoding="utf-8") as log:
        begin = time.monotonic()
        process = _start(setting, geometry, materials, output, num_steps, log)
        first_step_at, stopped = _watch(process, steps_file, setting.name, num_steps, clock)
    rows = read_steps(steps_file)
    _discard_all_but({steps_file, log_path})
    finished = Finished(
        setting=setting,
        rows=rows,
        exit_code=process.returncode,
        total_seconds=time.monotonic() - begin,
        start_seconds=first_step_at - begin - rows[0]["seconds"] if first_step_at is not None and rows else None,
        stopped=stopped,
        log=_last_lines(log_path),
    )
    if finished.note:
        print(f"{setting.name}: {finished.note}; its last lines:", *finished.log[-25:], sep="\n    ", flush=True)
    return finished


def _discard_all_but(kept: set[Path]) -> None:
    """Remove the LoRA, the state and the logs of a run: more than 1 GB each time at 14B."""
    for path in next(iter(kept)).parent.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path not in kept:
            path.unlink()


def _start(
    setting: Setting, geometry: str, materials: Materials, output: Path, num_steps: int, log: TextIO
) -> subprocess.Popen[bytes]:
    if setting.peer:
        command = [sys.executable, str(ROOT / "benchmarks" / "peer_diffusers.py"), setting.peer]
        command += ["--geometry", geometry, "--log", str(output / _STEP_LOG)]
    else:
        command = [sys.executable, str(ROOT / "wan_train_network.py"), "--task", GEOMETRIES[geometry].task]
        command += ["--dit", str(materials.dit), *setting.flags]
        command += ["--deterministic"] if setting.deterministic else []
        command += ["--dataset_config", str(materials.dataset), "--max_train_steps", str(num_steps)]
        command += ["--output_dir", str(output), "--output_name", "run", "--logging_dir", str(output / "logs")]
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment(), cwd=ROOT)


def environment() -> dict[str, str]:
    """What a measured process is started with: the project is found whether it is installed or not, and Python keeps
    what it compiles, as it does for users, whatever this process was told."""
    folders = [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    ours = {"PYTHONPATH": os.pathsep.join(filter(None, folders)), "PYTHONUNBUFFERED": "1"}
    theirs = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return theirs | ours


def _watch(
    process: "subprocess.Popen[bytes]", steps_file: Path, name: str, num_steps: int, clock: Clock
) -> tuple[float | None, bool]:
    """Wait for the end; returns when the first step was seen and whether the process had to be stopped."""
    first_step_at: float | None = None
    reported = time.monotonic()
    while process.poll() is None:
        time.sleep(_POLL_SECONDS)
        if first_step_at is None and steps_file.is_file() and steps_file.stat().st_size:
            first_step_at = time.monotonic()
        if time.monotonic() - reported >= _REPORT_SECONDS:
            reported = time.monotonic()
            print(f"[{clock.elapsed:4.0f} s] {name}: {_progress(steps_file, num_steps)}", flush=True)
        if clock.left <= 0:
            _stop(process)
            return first_step_at, True
    return first_step_at, False


def _progress(steps_file: Path, num_steps: int) -> str:
    rows = read_steps(steps_file)
    if not rows:
        return "no step yet"
    return f"step {len(rows)} of {num_steps}, the last took {rows[-1]['seconds']:.3f} s ({bucket_of(rows[-1])})"


def _stop(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _last_lines(log_path: Path) -> list[str]:
    """What was printed last, without the progress bars' intermediate states."""
    lines: Sequence[str] = log_path.read_bytes().decode("utf-8", errors="replace").split("\n")
    shown = [line.rstrip().rsplit("\r", 1)[-1] for line in lines]
    return [line for line in shown if line][-_LOG_LINES:]
