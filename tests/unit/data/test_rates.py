"""Choosing frames by time."""

import json
from pathlib import Path

import pytest

from wanlora.data.rates import accumulated, resample

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "musubi-golden.json").read_text(encoding="utf-8"))
KEPT: dict[str, list[int]] = GOLDEN["fps_resample_kept_source_indices_of_100"]


def times(frames: int, rate: float, *, milliseconds: bool = False) -> list[float]:
    return [round(k / rate, 3) if milliseconds else k / rate for k in range(frames)]


@pytest.mark.parametrize("rate", KEPT)
def test_a_declared_rate_keeps_the_frames_of_existing_caches(rate: str) -> None:
    assert list(accumulated(100, float(rate), 16.0)) == KEPT[rate]
    assert list(resample(times(100, 24.0), rate=24.0, source_fps=float(rate)).indexes) == KEPT[rate]


def test_a_clip_at_the_models_rate_is_taken_as_it_stands() -> None:
    found = resample(times(45, 16), rate=16.0)
    assert (found.indexes, found.rule, found.note) == (tuple(range(45)), "", "")


@pytest.mark.parametrize("frames", [2, 45, 300])
def test_rounded_timestamps_change_nothing(frames: int) -> None:
    for rate in (16, 24, 25, 30, 60):
        exact = resample(times(frames, rate), rate=rate).indexes
        assert resample(times(frames, rate, milliseconds=True), rate=rate).indexes == exact


def test_a_rate_that_differs_by_a_rounding_is_the_models() -> None:
    assert resample(times(1000, 16000 / 1001), rate=16000 / 1001).indexes == tuple(range(1000))


def test_thirty_frames_a_second_become_sixteen() -> None:
    found = resample(times(60, 30), rate=30.0)
    assert len(found.indexes) == 32  # two seconds
    assert all(index / 30 <= k / 16 + 1e-9 < (index + 1) / 30 + 1e-9 for k, index in enumerate(found.indexes))
    assert found.note.startswith("30 fps, resampled to 16 by timestamps")
    assert found.rule


def test_slow_clips_repeat_frames_and_say_so() -> None:
    declared = resample(times(10, 8), rate=8.0, source_fps=8.0)
    measured = resample(times(10, 8), rate=8.0)
    assert declared.indexes == measured.indexes == tuple(k // 2 for k in range(20))
    assert "none is dropped" in declared.note


def test_a_variable_rate_is_followed_by_its_timestamps() -> None:
    held = [0.0, 1 / 16, 2 / 16, 10 / 16, 11 / 16]  # the third frame stands for half a second
    assert resample(held, rate=16.0).indexes == (0, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 4)


def test_keep_takes_every_frame() -> None:
    found = resample(times(60, 30), rate=30.0, target_fps="keep")
    assert (found.indexes, found.note) == (tuple(range(60)), "")


def test_another_target_rate() -> None:
    assert resample(times(48, 48), rate=48.0, target_fps=24.0).indexes == tuple(range(0, 48, 2))


def test_a_single_frame_is_a_clip() -> None:
    assert resample([0.0], rate=30.0).indexes == (0,)
