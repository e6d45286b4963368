"""`wanlora quickstart` as a user types it."""

import subprocess
import sys
from pathlib import Path

import av

from wanlora.training.metrics import read_steps


def test_the_quickstart_leaves_everything_that_a_real_run_leaves(tmp_path: Path) -> None:
    out = tmp_path / "quick start"
    done = subprocess.run(
        [sys.executable, "-m", "wanlora", "quickstart", "--out", str(out)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for told in ("2 clips yield fewer windows than asked", "epoch: ", "wan_train_network.py --task t2v-14B"):
        assert told in done.stderr
    run = out / "run_1"
    assert (run / "output" / "tiny_style.safetensors").is_file()
    assert list((run / "logs").rglob("events.out.tfevents.*"))
    steps = read_steps(run / "output" / "tiny_style-steps.jsonl")
    assert len(steps) == 54
    assert {item.rpartition("_wan.")[0][-9:] for row in steps for item in row["items"]} >= {"0064x0048", "0096x0064"}
    samples = sorted((run / "output" / "sample").iterdir())
    assert {path.suffix for path in samples} == {".mp4", ".png"}
    before, *_, after = (path for path in samples if path.suffix == ".mp4")
    with av.open(str(before)) as first, av.open(str(after)) as last:
        assert first.streams.video[0].average_rate == last.streams.video[0].average_rate == 16
        assert first.streams.video[0].frames == last.streams.video[0].frames == 9
