"""`wanlora quickstart` as a user types it, with few steps and few prompts."""

import json
import subprocess
import sys
from pathlib import Path

import av
import pytest
from PIL import Image

from wanlora.training.metrics import read_steps, read_validations

SHORTENED = """
import sys
from dataclasses import replace
from wanlora.cli.main import main
from wanlora.quickstart import dataset
from wanlora.quickstart.run import Recipe
dataset.PROMPTS = dataset.PROMPTS[-2:]
right = Recipe.for_device
Recipe.for_device = lambda device, seed: replace(right(device, seed), steps=48)
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder it wrote, and what it said."""
    out = tmp_path_factory.mktemp("here") / "quick start"
    command = [sys.executable, "-c", SHORTENED, "quickstart", "--out", str(out)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return out, ended.stderr


def test_it_tells_what_happens_and_what_was_learned(done: tuple[Path, str]) -> None:
    for told in ("2 clips yield fewer windows than asked", "epoch: ", "validation: ", "wan_train_network.py --task"):
        assert told in done[1]
    assert "look (" in done[1] and "motion (" in done[1] and "% of the distance" in done[1]
    assert "LoRA off again: all 2 are the base's again, bit for bit" in done[1]


def test_it_leaves_everything_that_a_real_run_leaves(done: tuple[Path, str]) -> None:
    run = done[0] / "run_1"
    assert (run / "output" / "comic_flies.safetensors").is_file()
    assert list((run / "logs").rglob("events.out.tfevents.*"))
    steps = read_steps(run / "output" / "comic_flies-steps.jsonl")
    assert len(steps) == 48
    assert {item.rpartition("_wan.")[0][-9:] for row in steps for item in row["items"]} >= {"0064x0048", "0096x0064"}
    assert [row["step"] for row in read_validations(run / "output" / "comic_flies-steps.jsonl")][-1] == 48
    samples = sorted((run / "output" / "sample").iterdir())
    assert {path.suffix for path in samples} == {".mp4", ".png"}
    before, *_, after = (path for path in samples if path.suffix == ".mp4")
    with av.open(str(before)) as first, av.open(str(after)) as last:
        assert first.streams.video[0].average_rate == last.streams.video[0].average_rate == 16
        assert first.streams.video[0].frames == last.streams.video[0].frames == 45


def test_it_leaves_a_page_and_a_picture_of_what_was_learned(done: tuple[Path, str]) -> None:
    run = done[0] / "run_1"
    page = (run / "index.html").read_text(encoding="utf-8")
    assert page.count("<video") == page.count("<img") == 5
    with Image.open(run / "contact_sheet.png") as sheet:
        assert sheet.width > 1000
    measured = json.loads((run / "measures.json").read_text(encoding="utf-8"))
    assert measured["look"]["dataset"] > 0.9 and measured["motion"]["dataset"] > 0.9
    assert measured["off_equals_base"]
