"""The comparison of fp8 maths with bf16 maths, on models small enough for a processor."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.fp8_error import Comparison, main, random_batches, random_model, verdict
from benchmarks.materials import GEOMETRIES
from wanlora.models.wan.spec import WanSizes

SMALL = WanSizes(dim=128, ffn_dim=256, num_layers=2, text_dim=64)


def test_the_mix_is_rehearsed_and_its_figures_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = GEOMETRIES["tiny"]
    monkeypatch.setattr("benchmarks.fp8_error.GEOMETRIES", {"tiny": replace(geometry, sizes=SMALL)})
    assert main(["14B", "--steps", "5", "--device", "cpu", "--results", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "fp8-error-14B-cpu.json").read_text())
    assert report["within_bounds"] and len(report["steps"]) == 5
    assert {row["batch"] for row in report["steps"]} == {str(bucket.pixels) for bucket in geometry.buckets}
    assert all(0.99 < row["cosine/fp8"] < 1 for row in report["steps"])
    assert set(report["layers"]["mean_by_kind"]) >= {"self_attn.q", "cross_attn.v", "ffn.2"}


def test_another_draw_is_another_run_under_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = GEOMETRIES["tiny"]
    monkeypatch.setattr("benchmarks.fp8_error.GEOMETRIES", {"tiny": replace(geometry, sizes=SMALL)})
    losses = []
    for draw, name in (("0", "fp8-error-14B-cpu.json"), ("3", "fp8-error-14B-cpu-draw3.json")):
        assert main(["14B", "--steps", "1", "--draw", draw, "--device", "cpu", "--results", str(tmp_path)]) == 0
        losses.append(json.loads((tmp_path / name).read_text())["steps"][0]["loss/bf16"])
    assert losses[0] != losses[1]


def test_runs_of_the_same_maths_stay_the_same_and_do_train() -> None:
    batches = random_batches(GEOMETRIES["tiny"].buckets[:1], SMALL.text_dim, 3)
    comparison = Comparison(batches, rank=4, rate=1e-2, device=torch.device("cpu"))
    parts = comparison.adapt(random_model(SMALL, torch.device("cpu")))
    start = [parameter.detach().clone() for parameter in parts[1].parameters()]
    for name in ("one", "fp8"):
        comparison.add(name, parts)
    rows = comparison.run()
    assert all(row["loss_error/fp8"] == 0 and row["cosine/fp8"] == pytest.approx(1, abs=1e-5) for row in rows)
    one, other = comparison.runners
    assert all(torch.equal(a, b) for a, b in zip(one.weights, other.weights, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one.weights, start, strict=True))


@pytest.mark.parametrize(("loss", "cosine", "good"), [(0.009, 0.99, True), (-0.011, 0.99, False), (0.0, 0.97, False)])
def test_both_bounds_count(loss: float, cosine: float, good: bool) -> None:
    rows = [{"loss_error/fp8": 0.0, "cosine/fp8": 1.0}, {"loss_error/fp8": loss, "cosine/fp8": cosine}]
    assert verdict(rows, {})["within_bounds"] == good
