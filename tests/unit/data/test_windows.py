"""Frame windows against the reference table, and what is said of clips that are too short."""

import json
from pathlib import Path
from typing import Any

import pytest

from wanlora.data.windows import Extraction, Window
from wanlora.foundation.errors import ConfigError

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "musubi-golden.json").read_text(encoding="utf-8"))


def extraction(row: dict[str, Any]) -> Extraction:
    return Extraction(
        mode=row["mode"],
        targets=tuple(row["targets"]),
        stride=row.get("frame_stride", 1),
        sample=row.get("frame_sample", 1),
        max_frames=row.get("max_frames", 129),
    )


@pytest.mark.parametrize("row", GOLDEN["windows"], ids=lambda row: f"{row['mode']}-{row['targets']}")
def test_windows_are_those_of_existing_caches(row: dict[str, Any]) -> None:
    for num_frames, expected in row["rows"]:
        assert [[w.start, w.frames] for w in extraction(row).windows(num_frames)] == expected


def test_each_window_is_trained_once() -> None:
    twice = Extraction(mode="uniform", targets=(45,), sample=2)
    assert twice.windows(45) == (Window(0, 45), Window(0, 45))
    assert twice.distinct(45) == (Window(0, 45),)


@pytest.mark.parametrize(
    ("mode", "num_frames", "asked", "got", "words"),
    [
        ("uniform", 45, 2, 1, "only 1 distinct window of 45 frames in 45"),
        ("uniform", 44, 2, 0, "shorter than the 45 frames asked for"),
        ("head", 44, 1, 0, "shorter than the 45 frames asked for"),
        ("chunk", 44, 1, 0, "shorter than the 45 frames asked for"),
        ("slide", 44, 1, 0, "shorter than the 45 frames asked for"),
    ],
)
def test_a_clip_that_yields_less_than_asked_says_why(
    mode: str, num_frames: int, asked: int, got: int, words: str
) -> None:
    lack = Extraction(mode=mode, targets=(45,), sample=2).shortfall(num_frames)
    assert lack is not None
    assert (lack.asked, lack.got, lack.reason) == (asked, got, words)


def test_a_shortfall_counts_each_target() -> None:
    lack = Extraction(mode="head", targets=(1, 21, 45)).shortfall(30)
    assert lack is not None
    assert (lack.asked, lack.got) == (3, 2)


@pytest.mark.parametrize("mode", ["uniform", "head", "chunk", "slide", "full"])
def test_a_long_clip_lacks_nothing(mode: str) -> None:
    assert Extraction(mode=mode, targets=(5, 45), sample=2).shortfall(200) is None


@pytest.mark.parametrize("row", GOLDEN["windows"], ids=lambda row: f"{row['mode']}-{row['targets']}")
def test_every_window_is_recognised_as_possible(row: dict[str, Any]) -> None:
    assert all(extraction(row).could_yield(Window(*window)) for _, windows in row["rows"] for window in windows)


@pytest.mark.parametrize(
    ("mode", "window"),
    [
        ("head", Window(1, 5)),
        ("head", Window(0, 9)),
        ("chunk", Window(3, 5)),
        ("slide", Window(5, 5)),
        ("full", Window(0, 133)),
    ],
)
def test_a_window_of_another_setting_is_recognised_as_foreign(mode: str, window: Window) -> None:
    assert not Extraction(mode=mode, targets=(5,), stride=2).could_yield(window)


def test_an_unknown_mode_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'uniform'"):
        Extraction(mode="unifrom").windows(10)
