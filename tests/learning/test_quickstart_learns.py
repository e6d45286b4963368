"""What a person sees on the quickstart's page, measured: look and motion close most of the way, off is off."""

import json
from pathlib import Path

import pytest
import torch

from wanlora.quickstart.run import Recipe, Run, learn

CPU = torch.device("cpu")
LEAST = {"look": 0.5, "motion": 0.5}
"""The share of the distance between base and dataset that is closed at least."""


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_look_and_motion_are_learned(seed: int, tmp_path: Path) -> None:
    assert learn(tmp_path, Recipe.for_device(CPU, seed), CPU) == 0
    run = Run(folder=tmp_path / "run_1")
    measured = json.loads(run.measured.read_text(encoding="utf-8"))
    assert {name: measured[name]["closed"] >= least for name, least in LEAST.items()} == dict.fromkeys(LEAST, True)
    assert measured["look"]["base"] < 0.2 and measured["motion"]["base"] < 0.2
    assert measured["off_equals_base"]
    assert run.sheet.is_file() and run.page.is_file()
