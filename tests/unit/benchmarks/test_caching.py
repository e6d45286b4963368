"""What the benchmark of caching says of its figures."""

import json
from pathlib import Path

import pytest

from benchmarks.caching import Figures, Peer, main, verdicts


def figures(seconds: float, peak_gib: float) -> Figures:
    return Figures(seconds=seconds, fastest=seconds, slowest=seconds, first=1.0, peak_gib=peak_gib)


@pytest.mark.parametrize(("seconds", "peak", "good"), [(0.5, 2.0, 2), (0.51, 2.0, 1), (0.5, 2.1, 1), (0.6, 2.1, 0)])
def test_half_of_musubis_seconds_and_its_memory_are_aimed_for(seconds: float, peak: float, good: int) -> None:
    found = {"wanlora, batch 1": figures(seconds, peak), "diffusers, batch 1": figures(2.0, 3.0)}
    first, second = verdicts("a size", found, Peer(seconds=1.0, peak_gib=2.0))
    assert first.count("(within the aim)") == good and first.count("(NOT within the aim)") == 2 - good
    assert second == f"a size: {seconds / 2:.2f} of the seconds of diffusers, batch 1"


def test_both_encoders_are_measured(tmp_path: Path) -> None:
    assert main(["encode", "--repeats", "1", "--results", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("caching-*.json")
    (size,) = json.loads(path.read_text(encoding="utf-8"))["encode"].values()
    assert sorted(name.split()[0] for name in size) == ["diffusers", "musubi", "wanlora,"]
    assert all(found["seconds"] > 0 for found in size.values())


def test_reruns_of_the_real_script_are_timed(tmp_path: Path) -> None:
    assert main(["rerun", "--clips", "2", "--results", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("caching-*.json")
    found = json.loads(path.read_text(encoding="utf-8"))["rerun"]
    assert found["clips"] == 2 and len(found["seconds"]) == 3
