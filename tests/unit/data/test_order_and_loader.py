"""Order is a pure function of seed and epoch; loading reads what was cached, in any process."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.unit.data.datasets import clips_table, fill_caches, pictures_table, tables
from wanlora.data.dataset import Batch, CachedBatches
from wanlora.data.loader import make_loader
from wanlora.data.order import BatchSpec, epoch_batches
from wanlora.data.plan import DataPlan, plan_datasets
from wanlora.foundation.errors import DataError
from wanlora.foundation.random import Streams
from wanlora.foundation.shapes import LatentShape, PixelShape


@pytest.fixture
def plan(clips: Path, pictures: Path, tmp_path: Path) -> DataPlan:
    """Three pictures in batches of two, and six windows of two lengths, each three times, in batches of four."""
    return plan_datasets(
        tables(
            pictures_table(pictures, tmp_path / "p", batch_size=2),
            clips_table(clips, tmp_path / "c", target_frames=(1, 5), num_repeats=3, batch_size=4),
        )
    )


@pytest.fixture
def cached(plan: DataPlan) -> DataPlan:
    fill_caches(plan)
    return plan


def test_an_epoch_holds_every_sample_as_often_as_asked(plan: DataPlan) -> None:
    batches = epoch_batches(plan, Streams(2025), 1)
    counts = Counter(index for batch in batches for index in batch.indexes)
    assert counts == {index: 3 if item.window else 1 for index, item in enumerate(plan.items)}


def test_a_batch_is_of_one_dataset_and_one_shape_and_short_tails_are_kept(plan: DataPlan) -> None:
    batches = epoch_batches(plan, Streams(2025), 1)
    assert len(batches) == plan.num_batches == 2 + 3 + 3
    assert sorted(len(batch.indexes) for batch in batches) == [1, 1, 1, 2, 4, 4, 4, 4]
    for batch in batches:
        assert {plan.items[index].pixels for index in batch.indexes} == {batch.pixels}
        assert len({plan.items[index].dataset for index in batch.indexes}) == 1


def test_the_order_depends_on_seed_and_epoch_alone(plan: DataPlan) -> None:
    first = epoch_batches(plan, Streams(2025), 3)
    assert epoch_batches(plan, Streams(2025), 3) == first
    assert epoch_batches(plan, Streams(2025), 4) != first
    assert epoch_batches(plan, Streams(2026), 3) != first


def test_the_listing_of_the_folder_does_not_matter(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tables(clips_table(clips, tmp_path, target_frames=(1, 5)))
    expected = plan_datasets(config)
    listed = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda self: sorted(listed(self), reverse=True))
    assert plan_datasets(config).items == expected.items


def test_repeats_are_spread_over_batches(plan: DataPlan) -> None:
    orders = {
        batch.indexes
        for epoch in range(8)
        for batch in epoch_batches(plan, Streams(1), epoch)
        if len(batch.indexes) == 4
    }
    assert len(orders) > 20


def values(batch: Batch) -> list[int]:
    return [round(float(latents.float().mean())) for latents in batch.latents_BCFHW]


def test_a_batch_holds_the_cached_tensors(cached: DataPlan) -> None:
    spec = BatchSpec((4, 6, 4), PixelShape(64, 48, 5))
    assert {cached.items[index].pixels for index in spec.indexes} == {spec.pixels}
    batch = CachedBatches.of(cached)[spec]
    shape = LatentShape.of(spec.pixels)
    assert batch.latents_BCFHW.shape == (3, 16, shape.frames, shape.height, shape.width)
    assert batch.latents_BCFHW.dtype == torch.bfloat16
    assert values(batch) == [4, 6, 4]
    assert [text.shape for text in batch.text] == [(3, 8)] * 3
    assert batch.names == tuple(cached.items[index].name for index in spec.indexes)


def test_a_cache_of_another_shape_is_named(cached: DataPlan) -> None:
    with pytest.raises(DataError, match="was cached for 64x48x1, the dataset asks for 64x48x5"):
        CachedBatches.of(cached)[BatchSpec((0,), PixelShape(64, 48, 5))]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_errors_name_the_file_in_any_process(cached: DataPlan, num_workers: int) -> None:
    cached.items[5].latent_path.unlink()
    specs = [BatchSpec((index,), cached.items[index].pixels) for index in range(7)]
    seen = []
    with pytest.raises(DataError) as caught:
        for batch in make_loader(cached, specs, num_workers=num_workers):
            seen += values(batch)
    assert seen == [0, 1, 2, 3, 4]
    assert str(caught.value).startswith(str(cached.items[5].latent_path))


@pytest.mark.parametrize("context", [None, "spawn"])
def test_persistent_workers_follow_each_epochs_order(cached: DataPlan, context: str | None) -> None:
    workers = 1 if context else 2
    loader = make_loader(cached, num_workers=workers, persistent=True, multiprocessing_context=context)
    streams = Streams(2025)
    processes = set()
    for epoch in (1, 2):
        specs = epoch_batches(cached, streams, epoch)
        batches = list(loader.use(specs))
        assert len(loader) == len(specs)
        assert [tuple(values(batch)) for batch in batches] == [spec.indexes for spec in specs]
        processes |= {worker.pid for worker in loader._iterator._workers}  # type: ignore[union-attr]
    assert len(processes) == workers


def test_an_epoch_left_early_does_not_leak_into_the_next(cached: DataPlan) -> None:
    loader = make_loader(cached, num_workers=1, persistent=True)
    specs = epoch_batches(cached, Streams(1), 1)
    next(iter(loader.use(specs)))
    rest = specs[5:]
    assert [tuple(values(batch)) for batch in loader.use(rest)] == [spec.indexes for spec in rest]


def test_loading_does_not_touch_the_global_generator(cached: DataPlan) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    list(make_loader(cached, epoch_batches(cached, Streams(1), 1)))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_batch_keeps_its_parts_when_it_is_pinned(cached: DataPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = CachedBatches.of(cached)[BatchSpec((4,), PixelShape(64, 48, 5))]
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self + 1)
    pinned = batch.pin_memory()
    assert torch.equal(pinned.latents_BCFHW, batch.latents_BCFHW + 1)
    assert torch.equal(pinned.text[0], batch.text[0] + 1)
    assert replace(pinned, latents_BCFHW=batch.latents_BCFHW, text=batch.text) == batch
