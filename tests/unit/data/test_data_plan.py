"""A dataset file gives exactly its samples, and says what it does not give."""

import json
import shutil
from pathlib import Path

import pytest

from tests.unit.data.clips import frame_numbers, make_clip, make_picture, write_caption
from tests.unit.data.datasets import clips_table, fill_caches, pictures_table, rows_table, tables
from wanlora.data import decoding, probing
from wanlora.data.index import INDEX_NAME
from wanlora.data.info import VideoInfo
from wanlora.data.media import read_items
from wanlora.data.plan import DataPlan, plan_datasets
from wanlora.data.report import epoch_line, report_lines
from wanlora.data.sources import Source
from wanlora.foundation.errors import DataError
from wanlora.foundation.shapes import PixelShape


def names(plan: DataPlan) -> list[str]:
    return [item.name for item in plan.items]


def without_probing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: Source) -> None:
        raise AssertionError(f"{source.path} was opened")

    monkeypatch.setattr(probing, "probe", fail)


def test_every_source_window_and_bucket_gives_one_sample(clips: Path, tmp_path: Path) -> None:
    plan = plan_datasets(tables(clips_table(clips, tmp_path, target_frames=(1, 21), target_fps="keep")))
    assert names(plan) == [
        f"{name}_00000-{frames}_0064x0048_wan.safetensors" for name in "abc" for frames in ("001", "021")
    ]
    assert [item.pixels for item in plan.items[:2]] == [PixelShape(64, 48, 1), PixelShape(64, 48, 21)]
    assert {item.text_path.name for item in plan.items} == {f"{name}_wan_te.safetensors" for name in "abc"}
    assert plan.captions()[tmp_path / "a_wan_te.safetensors"] == "clip a"
    assert not plan.shortfalls


def test_pictures_are_named_by_their_own_size(pictures: Path, tmp_path: Path) -> None:
    plan = plan_datasets(tables(pictures_table(pictures, tmp_path, resolution=(32, 32))))
    assert names(plan) == [f"{name}_0064x0048_wan.safetensors" for name in "pqr"]
    assert {item.pixels for item in plan.items} == {PixelShape(32, 32, 1)}


def test_uniform_windows_that_coincide_are_trained_once_and_named(clips: Path, tmp_path: Path) -> None:
    table = clips_table(clips, tmp_path, target_frames=(21,), frame_extraction="uniform", frame_sample=2)
    plan = plan_datasets(tables(table))
    assert [str(shortfall) for shortfall in plan.shortfalls] == [
        "b.mp4: 21 frames, 1 of 2 windows: only 1 distinct window of 21 frames in 21",
        "c.mp4: 16 frames after resampling 30, 0 of 2 windows: shorter than the 21 frames asked for",
    ]
    lines = report_lines(plan)
    assert "style.toml: [[datasets]] 1: 2 clips yield fewer windows than asked:" in lines
    assert f"  {plan.shortfalls[0]}" in lines
    assert lines[-1] == "epoch: 3 clips x 2 windows (21 frames) - 3 = 3 samples in 3 batches"


def test_another_rate_is_named_with_both_rates_and_resampled(clips: Path, tmp_path: Path) -> None:
    plan = plan_datasets(tables(clips_table(clips, tmp_path, target_frames=(5,))))
    by_name = {item.source.path.name: item for item in plan.items}
    assert by_name["a.mp4"].indexes == (0, 1, 2, 3, 4)
    assert by_name["c.mp4"].indexes == (0, 1, 3, 5, 7)
    assert by_name["c.mp4"].resampling
    notes = [line for line in report_lines(plan) if "fps" in line]
    assert notes == [
        "style.toml: [[datasets]] 1: 1 clip (c.mp4): 30 fps, resampled to 16 by timestamps; "
        'target_fps = "keep" would take every frame'
    ]


def test_buckets_hold_for_clips_too(clips: Path, tmp_path: Path) -> None:
    exact = plan_datasets(tables(clips_table(clips, tmp_path / "1", resolution=(64, 32))))
    assert {item.pixels for item in exact.items} == {PixelShape(64, 32, 1)}
    assert any("musubi ignores them" in line for line in report_lines(exact))
    kept = clips_table(clips, tmp_path / "2", resolution=(96, 96), enable_bucket=True, bucket_no_upscale=True)
    assert {item.pixels for item in plan_datasets(tables(kept)).items} == {PixelShape(64, 48, 1)}


def test_a_source_of_two_tables_is_recognised_and_decoded_once(clips: Path, tmp_path: Path) -> None:
    first = clips_table(clips, tmp_path / "1", target_frames=(1, 5))
    second = clips_table(clips / ".." / clips.name, tmp_path / "2", resolution=(32, 32), target_frames=(5,))
    plan = plan_datasets(tables(first, second))
    passes = decoding.decoded.passes
    grouped = plan.by_source()
    assert len(grouped) == 3
    items = grouped[(clips / "a.mp4").resolve()]
    clips_read = {item.name: clip for item, clip in read_items(items)}
    assert decoding.decoded.passes - passes == 1
    assert {name: clip.shape for name, clip in clips_read.items()} == {
        "a_00000-001_0064x0048_wan.safetensors": (1, 48, 64, 3),
        "a_00000-005_0064x0048_wan.safetensors": (5, 48, 64, 3),
        "a_00000-005_0032x0032_wan.safetensors": (5, 32, 32, 3),
    }
    assert frame_numbers(clips_read["a_00000-005_0064x0048_wan.safetensors"]) == [0, 1, 2, 3, 4]


def test_a_picture_is_read_at_each_size(pictures: Path, tmp_path: Path) -> None:
    small = pictures_table(pictures, tmp_path / "2", resolution=(32, 32))
    plan = plan_datasets(tables(pictures_table(pictures, tmp_path / "1"), small))
    items = plan.by_source()[(pictures / "p.png").resolve()]
    assert [clip.shape for _, clip in read_items(items)] == [(1, 48, 64, 3), (1, 32, 32, 3)]


def test_jsonl_rows_may_be_folders_of_frames(tmp_path: Path) -> None:
    for number in range(6):
        make_picture(tmp_path / "walk" / f"{number}.png", level=number * 4)
    table = rows_table(
        tmp_path / "rows.jsonl", tmp_path / "cache", [(tmp_path / "walk", "walking")], target_frames=(5,)
    )
    plan = plan_datasets(tables(table))
    assert names(plan) == ["walk_00000-005_0064x0048_wan.safetensors"]
    ((_, clip),) = read_items(plan.items)
    assert frame_numbers(clip) == [0, 1, 2, 3, 4]


def test_everything_wrong_is_listed_together_and_nothing_is_lost(clips: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    write_caption(make_clip(bad / "a.mp4", 5))
    for name in ("broken.mp4", "empty.mp4"):
        write_caption(bad / name)
        (bad / name).write_bytes(b"x" * (name == "broken.mp4"))
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "old_wan_te.safetensors").write_bytes(b"x")
    with pytest.raises(DataError) as caught:
        plan_datasets(tables(clips_table(bad, cache), clips_table(tmp_path / "mistyped", cache)))
    message = str(caught.value)
    assert "broken.mp4" in message and "empty.mp4" in message and "mistyped" in message
    assert (cache / "old_wan_te.safetensors").exists()


def test_clips_that_are_all_too_short_are_an_error(clips: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the longest has 45 frames"):
        plan_datasets(tables(clips_table(clips, tmp_path, target_frames=(49,))))


def test_two_tables_that_would_write_one_file_differently_are_refused(pictures: Path, tmp_path: Path) -> None:
    small = pictures_table(pictures, tmp_path, resolution=(32, 32))
    with pytest.raises(DataError, match="would both write"):
        plan_datasets(tables(pictures_table(pictures, tmp_path), small))
    assert len(plan_datasets(tables(small, small)).items) == 6


def test_a_second_plan_opens_only_what_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "clips"
    for name in "ab":
        write_caption(make_clip(folder / f"{name}.mp4", 5))
    config = tables(clips_table(folder, tmp_path / "cache"))
    before = plan_datasets(config)
    opened: list[str] = []
    real = probing.probe

    def probe(source: Source) -> VideoInfo:
        opened.append(source.path.name)
        return real(source)

    monkeypatch.setattr(probing, "probe", probe)
    assert plan_datasets(config) == before
    assert opened == []
    make_clip(folder / "b.mp4", 9)
    assert plan_datasets(config) != before
    assert opened == ["b.mp4"]
    (folder / "a.mp4").unlink()
    plan_datasets(config)
    assert list(json.loads((tmp_path / "cache" / INDEX_NAME).read_text("utf-8"))["sources"]) == ["b.mp4"]


def test_a_dry_run_writes_nothing(clips: Path, tmp_path: Path) -> None:
    plan_datasets(tables(clips_table(clips, tmp_path / "cache")), write_index=False)
    assert not (tmp_path / "cache").exists()


def test_a_broken_index_is_measured_again(clips: Path, tmp_path: Path) -> None:
    (tmp_path / INDEX_NAME).write_text('{"format": 1, "sour', encoding="utf-8")
    assert len(plan_datasets(tables(clips_table(clips, tmp_path))).items) == 3


def moved_away(clips: Path, tmp_path: Path, **keys: object) -> tuple[DataPlan, Path]:
    """A plan whose caches exist and whose sources are then gone."""
    folder = tmp_path / "here"
    shutil.copytree(clips, folder)
    plan = plan_datasets(tables(clips_table(folder, tmp_path / "cache", **keys)))
    fill_caches(plan)
    shutil.rmtree(folder)
    return plan, folder


def test_training_is_planned_from_the_index_where_the_sources_are_not(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, folder = moved_away(clips, tmp_path, target_frames=(1, 21))
    config = tables(clips_table(folder, tmp_path / "cache", target_frames=(1, 21)))
    without_probing(monkeypatch)
    plan = plan_datasets(config, sources_may_be_absent=True)
    assert (names(plan), plan.shortfalls) == (names(before), before.shortfalls)
    assert any("is not at hand" in line for line in report_lines(plan))
    with pytest.raises(DataError, match="does not exist"):
        plan_datasets(config)


def test_training_is_planned_from_the_caches_where_nothing_else_is(clips: Path, tmp_path: Path) -> None:
    before, folder = moved_away(clips, tmp_path, target_frames=(1, 5))
    cache = tmp_path / "cache"
    (cache / INDEX_NAME).unlink()
    for stray in ("a_00000-009_0064x0048", "a_00000-005_0032x0048", "a_00003-005_0064x0048", "a_0064x0048"):
        (cache / f"{stray}_wan.safetensors").write_bytes(b"x")
    plan = plan_datasets(tables(clips_table(folder, cache, target_frames=(1, 5))), sources_may_be_absent=True)
    assert names(plan) == names(before)
    assert any("whose cache files lie there" in line for line in report_lines(plan))
    assert epoch_line(plan) == "epoch: 6 cached windows x 1 = 6 samples in 6 batches"


def test_training_without_sources_and_caches_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"run wan_cache_latents\.py"):
        plan_datasets(tables(clips_table(tmp_path / "gone", tmp_path / "cache")), sources_may_be_absent=True)


def test_rows_whose_clips_are_absent_are_errors_or_stand_in(clips: Path, tmp_path: Path) -> None:
    table = rows_table(tmp_path / "rows.jsonl", tmp_path, [(clips / "a.mp4", "x"), (tmp_path / "gone.mp4", "y")])
    with pytest.raises(DataError, match=r"1 sources do not exist: .*gone\.mp4"):
        plan_datasets(tables(table))
    (tmp_path / "gone_00000-001_0064x0048_wan.safetensors").write_bytes(b"x")
    plan = plan_datasets(tables(table), sources_may_be_absent=True)
    assert [item.source.stem for item in plan.items] == ["a", "gone"]


def write_index(cache: Path, kind: str, frames: dict[str, int]) -> None:
    entries = {
        name: {
            "kind": kind,
            "size": 1,
            "mtime_ns": 1,
            "width": 1920,
            "height": 1040,
            "rate": 16.0,
            "times": [k / 16 for k in range(count)],
        }
        for name, count in frames.items()
    }
    cache.mkdir()
    (cache / INDEX_NAME).write_text(json.dumps({"format": 1, "sources": entries}), encoding="utf-8")


def test_the_reference_datasets_epoch_is_a_sum_that_can_be_checked(tmp_path: Path) -> None:
    """120 pictures and 240 clips of 45 to 88 frames, two of exactly 45: 1078 samples, not 1080."""
    clip_frames = {f"{number:04d}.mp4": 45 if number in (7, 9) else 46 + number % 43 for number in range(240)}
    write_index(tmp_path / "0", "image", {f"{number:04d}.png": 1 for number in range(120)})
    for cache in ("1", "2"):
        write_index(tmp_path / cache, "video", clip_frames)
    bucketed = {"enable_bucket": True, "bucket_no_upscale": True}
    gone = tmp_path / "gone"
    plan = plan_datasets(
        tables(
            pictures_table(gone, tmp_path / "0", resolution=(768, 768), **bucketed),
            clips_table(gone, tmp_path / "1", resolution=(768, 416), target_frames=(1, 21), **bucketed),
            clips_table(
                gone,
                tmp_path / "2",
                resolution=(384, 208),
                target_frames=(45,),
                frame_extraction="uniform",
                frame_sample=2,
                **bucketed,
            ),
        ),
        sources_may_be_absent=True,
        write_index=False,
    )
    assert epoch_line(plan) == (
        "epoch: 120 images x 1 + 240 clips x 2 windows (1, 21 frames) + 240 clips x 2 windows (45 frames) - 2 "
        "= 1078 samples in 1078 batches"
    )
    assert [shortfall.source.name for shortfall in plan.shortfalls] == ["0007.mp4", "0009.mp4"]
    assert "0007_00000-045_0384x0208_wan.safetensors" in names(plan)


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"frame_extraction": "full"}, "epoch: 3 clips x 1 window = 3 samples in 3 batches"),
        (
            {"frame_extraction": "chunk", "target_frames": (13,)},
            "epoch: 5 chunk windows (13 frames) of 3 clips = 5 samples in 5 batches",
        ),
        (
            {"target_frames": (1, 45), "num_repeats": 3, "batch_size": 2},
            "epoch: 3 clips x 2 windows (1, 45 frames) x 3 repeats - 6 = 12 samples in 7 batches",
        ),
    ],
)
def test_other_epochs_add_up_too(clips: Path, tmp_path: Path, keys: dict[str, object], line: str) -> None:
    plan = plan_datasets(tables(clips_table(clips, tmp_path, **keys)))
    assert epoch_line(plan) == line
