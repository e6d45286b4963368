"""The benchmark itself, in small."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_the_benchmark_measures_every_bucket_with_the_real_trainer(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/training_step.py", "make", "time", "--geometry", "tiny"]
    command += ["--work", str(tmp_path), "--results", str(tmp_path / "results")]
    command += ["--configs", "reference-eager", "--warmup", "0", "--timed", "1"]
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (tmp_path / "results").glob("*.json")
    run = json.loads(path.read_text(encoding="utf-8"))["runs"]["reference-eager"]
    assert set(run["buckets"]) == {"96x96x1", "96x64x1", "96x64x5", "64x32x9"}
    weights = {"96x96x1": 120, "96x64x1": 240, "96x64x5": 240, "64x32x9": 480}
    seconds = sum(count * run["buckets"][bucket]["seconds"] for bucket, count in weights.items())
    assert run["mix_seconds"] == seconds
    assert run["start_seconds"] > 0
    assert "mix s/epoch" in done.stdout
