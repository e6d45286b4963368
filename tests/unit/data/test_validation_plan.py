"""What is validated on is planned, checked and reported beside what is trained, and never trained."""

from pathlib import Path

import pytest

from tests.unit.data.datasets import clips_table, fill_caches, pictures_table, tables
from wanlora.data.checks import check_caches, remarks
from wanlora.data.dataset import CachedBatches
from wanlora.data.order import epoch_batches, fixed_batches
from wanlora.data.plan import DataPlan, plan_datasets
from wanlora.data.report import epoch_line, report_lines
from wanlora.foundation.errors import DataError
from wanlora.foundation.random import Streams

WHERE = "style.toml: [[validation]] 1"


@pytest.fixture
def plan(clips: Path, pictures: Path, tmp_path: Path) -> DataPlan:
    """Pictures are trained, clips are validated on."""
    unseen = clips_table(clips, tmp_path / "unseen", target_frames=(1, 5), batch_size=2, where=WHERE)
    return plan_datasets(tables(pictures_table(pictures, tmp_path / "trained"), validation=(unseen,)))


def test_validation_is_a_plan_of_its_own_and_not_trained(plan: DataPlan) -> None:
    assert plan.validation is not None and plan.validation.validation is None
    assert {item.source.kind for item in plan.items} == {"image"}
    assert {item.source.kind for item in plan.validation.items} == {"video"}
    assert (plan.num_samples, plan.validation.num_samples) == (3, 6)
    assert plan.cached_items == (*plan.items, *plan.validation.items)
    assert [plan.tables[item.dataset].config.where for item in plan.cached_items[2:4]] == [
        "style.toml: [[datasets]] 2",
        WHERE,
    ]
    trained = [index for batch in epoch_batches(plan, Streams(1), 0) for index in batch.indexes]
    assert sorted(trained) == [0, 1, 2]


def test_what_is_trained_does_not_change_by_validation(pictures: Path, tmp_path: Path, plan: DataPlan) -> None:
    alone = plan_datasets(tables(pictures_table(pictures, tmp_path / "trained")))
    assert alone.validation is None and alone.cached_items == alone.items == plan.items
    assert epoch_batches(alone, Streams(1), 3) == epoch_batches(plan, Streams(1), 3)
    assert [line for line in report_lines(alone) if "alidation" in line] == []


def test_fixed_batches_hold_every_sample_once_in_order(plan: DataPlan) -> None:
    assert plan.validation is not None
    batches = fixed_batches(plan.validation)
    assert [batch.indexes for batch in batches] == [(0, 2), (4,), (1, 3), (5,)]
    assert [batch.pixels.frames for batch in batches] == [1, 1, 5, 5]
    fill_caches(plan)
    read = CachedBatches.of(plan.validation)[batches[2]]
    assert [name[:11] for name in read.names] == ["a_00000-005", "b_00000-005"]


def test_the_report_counts_validation_on_a_line_of_its_own(plan: DataPlan) -> None:
    lines = report_lines(plan)
    assert lines[-2:] == [
        "epoch: 3 images x 1 = 3 samples in 3 batches",
        "validation: 3 clips x 2 windows (1, 5 frames) = 6 samples",
    ]
    assert f"{WHERE}: 6 samples, width x height x frames (samples): 64x48x1 (3), 64x48x5 (3)" in lines
    assert any(line.startswith(f"{WHERE}: 1 clip (c.mp4): 30 fps") for line in lines)


def test_too_short_validation_clips_are_named_and_counted(clips: Path, pictures: Path, tmp_path: Path) -> None:
    unseen = clips_table(clips, tmp_path / "unseen", target_frames=(21,), where=WHERE)
    plan = plan_datasets(tables(pictures_table(pictures, tmp_path), validation=(unseen,)))
    lines = report_lines(plan)
    assert f"{WHERE}: 1 clip yields fewer windows than asked:" in lines
    assert lines[-1] == "validation: 3 clips x 1 window (21 frames) - 1 = 2 samples"
    assert epoch_line(plan) == "epoch: 3 images x 1 = 3 samples in 3 batches"


def test_clips_that_are_trained_as_well_are_named(clips: Path, pictures: Path, tmp_path: Path) -> None:
    trained = clips_table(clips, tmp_path / "1", target_frames=(1, 5))
    again = clips_table(clips / ".." / clips.name, tmp_path / "2", resolution=(32, 32), where=WHERE)
    unseen = pictures_table(pictures, tmp_path / "3", where="style.toml: [[validation]] 2")
    plan = plan_datasets(tables(trained, validation=(again, unseen)))
    assert [source.path.name for source in plan.overlap] == ["a.mp4", "b.mp4", "c.mp4"]
    (line,) = [line for line in report_lines(plan) if "also trained on" in line]
    assert line.startswith("3 validation clips are also trained on (a.mp4, b.mp4, c.mp4)")


def test_missing_caches_of_validation_are_problems_too(plan: DataPlan) -> None:
    fill_caches(plan)
    assert check_caches(plan) == [] and remarks(plan) == []
    assert plan.validation is not None
    plan.validation.items[0].latent_path.unlink()
    (problem,) = check_caches(plan)
    assert "unseen" in problem and "is missing; run wan_cache_latents.py" in problem
    (plan.validation.items[0].latent_path.parent / "old_0064x0048_wan.safetensors").write_bytes(b"x")
    assert any("old_0064x0048_wan.safetensors" in line for line in remarks(plan))


def test_what_is_wrong_with_validation_is_an_error(pictures: Path, tmp_path: Path) -> None:
    gone = clips_table(tmp_path / "gone", tmp_path / "2", where=WHERE)
    with pytest.raises(DataError, match=r"\[\[validation\]\] 1: video_directory .*gone does not exist"):
        plan_datasets(tables(pictures_table(pictures, tmp_path / "1"), validation=(gone,)))
