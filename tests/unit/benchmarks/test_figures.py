"""Step logs to figures."""

from typing import Any

import pytest

from benchmarks.figures import (
    PEERS,
    bucket_of,
    figures_by_bucket,
    first_difference,
    largest_difference,
    mix_seconds,
    peer_ratios,
    ratio_lines,
    swap_costs,
    table,
    tokens_per_second,
)
from benchmarks.materials import GEOMETRIES

BUCKETS = GEOMETRIES["14B"].buckets
FILES = (
    "a_0768x0768_wan.safetensors",
    "a_00000-001_0768x0416_wan.safetensors",
    "a_00000-021_0768x0416_wan.safetensors",
    "a_00012-045_0384x0208_wan.safetensors",
)


def row(file: str, seconds: float, peak: float = 1.0, **other: Any) -> dict[str, Any]:
    return {"items": [file], "seconds": seconds, "memory/peak_gib": peak, **other}


def epoch(seconds: tuple[float, ...]) -> list[dict[str, Any]]:
    return [row(file, second) for file, second in zip(FILES, seconds, strict=True)]


def _cells(*seconds: int) -> list[str]:
    return [word for second in seconds for word in (f"{second}.000", "/", "1.0")]


def test_a_cache_name_tells_its_bucket() -> None:
    found = [bucket_of(row(file, 1.0)) for file in FILES]
    assert found == [str(bucket.pixels) for bucket in BUCKETS]


def test_a_row_that_names_its_bucket_and_a_batch_of_several_are_understood() -> None:
    assert bucket_of({"bucket": "768x416x21", "seconds": 1.0}) == "768x416x21"
    assert bucket_of({"items": [FILES[1], FILES[1]]}) == "768x416x1"


def test_every_setting_is_compared_with_every_peer_of_its_run() -> None:
    measured = {
        "keep": figures_by_bucket(epoch((1, 2, 3, 4)), 0),
        "peer-eager": figures_by_bucket(epoch((2, 8, 3, 4)), 0),
        "stopped": figures_by_bucket(epoch((1, 2, 3, 4))[:1], 0),
    }
    ratios = peer_ratios(measured, {"peer-eager", "peer-compile"}, BUCKETS)
    assert list(ratios) == ["keep / peer-eager", "stopped / peer-eager"]
    mix = (120 * 1 + 240 * 2 + 240 * 3 + 480 * 4) / (120 * 2 + 240 * 8 + 240 * 3 + 480 * 4)
    assert list(ratios["keep / peer-eager"].values()) == [0.5, 0.25, 1.0, 1.0, pytest.approx(mix)]
    assert ratio_lines(ratios)[1] == "stopped / peer-eager: 768x768x1 0.500"


def test_first_frames_in_a_batch_have_the_tokens_of_a_clip() -> None:
    short, long = GEOMETRIES["14B"].equal_batches
    assert (str(short.pixels), short.batch_size, str(long.pixels)) == ("768x416x1", 6, "768x416x21")
    figures = figures_by_bucket([row(FILES[1], 2.0), row(FILES[2], 1.0)], 0)
    assert tokens_per_second(figures, (short, long)) == {"768x416x1": 3744, "768x416x21": 7488}


def test_warm_up_steps_are_left_out_of_each_bucket() -> None:
    rows = [row(FILES[0], 90.0, peak=50.0), row(FILES[1], 80.0), row(FILES[0], 3.0, peak=7.0), row(FILES[0], 1.0)]
    figures = figures_by_bucket([*rows, row(FILES[0], 2.0, peak=8.0)], warmup=1)
    assert list(figures) == ["768x768x1"]
    measured = figures["768x768x1"]
    assert (measured.seconds, measured.fastest, measured.slowest) == (2.0, 1.0, 3.0)
    assert (measured.peak_gib, measured.num_steps) == (8.0, 3)


def test_the_mix_is_made_of_means_without_single_steps_that_were_compiled() -> None:
    rows = [row(FILES[0], second) for second in (1.0, 1.0, 1.0, 2.0, 40.0)]
    figures = figures_by_bucket(rows, warmup=0)["768x768x1"]
    assert (figures.seconds, figures.mean, figures.slowest) == (1.0, 1.25, 40.0)
    assert mix_seconds({"768x768x1": figures}, BUCKETS[:1]) == 120 * 1.25


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_the_peers_mix_follows_from_their_buckets(peer: Any) -> None:
    figures = figures_by_bucket(epoch(peer.seconds), warmup=0)
    assert mix_seconds(figures, BUCKETS) == pytest.approx(peer.mix, rel=0.003)


def test_a_mix_without_one_of_its_buckets_is_not_known() -> None:
    assert mix_seconds(figures_by_bucket(epoch((1, 1, 1, 1))[:3], warmup=0), BUCKETS) is None


def test_logs_that_differ_in_the_last_bit_are_told_apart() -> None:
    ours = [{"step": step, "items": ["a"], "t": [0.5], "loss": 0.3, "grad_norm": 1.0} for step in (1, 2)]
    theirs = [dict(line) for line in ours]
    assert first_difference(ours, theirs) is None
    theirs[1]["grad_norm"] = 1.0 + 2**-52
    assert first_difference(ours, theirs) == "step 2, grad_norm: 1.0 and 1.0000000000000002"
    assert first_difference(ours[:1], ours) == "1 steps and 2 steps"
    theirs[0]["loss"] = 0.6
    assert largest_difference(ours, theirs) == pytest.approx(0.5)


def test_the_table_shows_our_rows_and_the_peers() -> None:
    measured = {"no-swap": figures_by_bucket(epoch((1, 2, 3, 4)), 0), "failed": figures_by_bucket([], 0)}
    labels = {"no-swap": "ours", "failed": "theirs"}
    lines = table(measured, BUCKETS, labels=labels, notes={"failed": "exit code 1"}, peers=True).splitlines()
    assert lines[1].split() == ["ours", *_cells(1, 2, 3, 4), "3240"]
    assert lines[2].endswith("(exit code 1)")
    assert len(lines) == 3 + len(PEERS) + 1


def test_the_cost_of_swapping_is_relative_to_the_same_settings_without() -> None:
    measured = {
        "reference": figures_by_bucket(epoch((1.1, 2.0, 3.0, 4.0)), 0),
        "no-swap": figures_by_bucket(epoch((1.0, 2.0, 3.0, 5.0)), 0),
    }
    (line,) = swap_costs(measured, [("reference", "no-swap"), ("swap-36", "no-swap")], BUCKETS)
    assert line.startswith("reference against no-swap: 768x768x1 +10.0%, 768x416x1 +0.0%")
    assert line.endswith("384x208x45 -20.0%")
