"""Exactly the samples that a dataset file asks for, known before anything is encoded or loaded.

The usual trainer trains whatever lies in the cache folder. Here the file is the only authority: sources, windows and
buckets give the samples, the samples give the names of their cache files, and what lies beside them is named and left
alone. Sources are needed once; afterwards the index kept beside the caches, or the caches' names, can stand in.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from wanlora.config.dataset import DatasetConfig, DatasetsConfig
from wanlora.data.index import SourceIndex, measure
from wanlora.data.items import Cut, Item, Shortfall, cut_source, items_of_caches, selector_of
from wanlora.data.sources import Source, find_sources, kind_of, require_distinct, some
from wanlora.foundation.errors import DataError, Problems
from wanlora.foundation.shapes import PixelShape


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetPlan:
    """What one table of the TOML yields."""

    config: DatasetConfig
    items: tuple[Item, ...]
    """Each sample once, sorted by cache name."""
    shortfalls: tuple[Shortfall, ...]
    notes: tuple[str, ...]
    """What there is to tell about sources, without the place."""

    @property
    def repeats(self) -> int:
        """How often an epoch shows each sample."""
        return self.config.num_repeats

    @property
    def num_samples(self) -> int:
        """Samples an epoch, repeats included."""
        return len(self.items) * self.repeats

    @property
    def buckets(self) -> dict[PixelShape, int]:
        """Samples an epoch of each shape, repeats included, by shape."""
        counts = Counter(item.pixels for item in self.items)
        return {shape: counts[shape] * self.repeats for shape in sorted(counts)}

    @property
    def num_batches(self) -> int:
        """Batches an epoch; a bucket's last batch may be short."""
        return sum(-(-count // self.config.batch_size) for count in self.buckets.values())

    @property
    def num_sources(self) -> int:
        """Sources that yield a sample or fall short of it."""
        return len({item.source.path for item in self.items} | {shortfall.source for shortfall in self.shortfalls})


@dataclass(frozen=True, kw_only=True)
class DataPlan:
    """What a dataset file yields."""

    path: Path
    """The dataset file."""
    datasets: tuple[DatasetPlan, ...]
    validation: "DataPlan | None" = None
    """What the loss is measured on and what is never trained; None if the file has no `[[validation]]`."""

    @cached_property
    def items(self) -> tuple[Item, ...]:
        """Every sample once, by sub-dataset and cache name; batches refer to positions in it."""
        return tuple(item for dataset in self.datasets for item in dataset.items)

    @property
    def tables(self) -> tuple[DatasetPlan, ...]:
        """Every table of the file, those of the validation last; `Item.dataset` counts them."""
        return (*self.datasets, *(self.validation.datasets if self.validation else ()))

    @property
    def cached_items(self) -> tuple[Item, ...]:
        """Every sample that has to be cached: what is trained, then what is validated on."""
        return tuple(item for table in self.tables for item in table.items)

    @property
    def overlap(self) -> tuple[Source, ...]:
        """Sources that are validated on although they are trained, each once."""
        trained = {item.source.path.resolve() for item in self.items}
        validated = {item.source.path.resolve(): item.source for item in self.cached_items[len(self.items) :]}
        return tuple(source for path, source in validated.items() if path in trained)

    @property
    def shortfalls(self) -> tuple[Shortfall, ...]:
        """Every clip that yields less than asked."""
        return tuple(shortfall for dataset in self.datasets for shortfall in dataset.shortfalls)

    @property
    def num_samples(self) -> int:
        """Samples an epoch, repeats included."""
        return sum(dataset.num_samples for dataset in self.datasets)

    @property
    def num_batches(self) -> int:
        """Batches an epoch."""
        return sum(dataset.num_batches for dataset in self.datasets)

    @property
    def shapes(self) -> tuple[PixelShape, ...]:
        """The distinct sizes, ascending."""
        return tuple(sorted({item.pixels for item in self.items}))

    def by_source(self) -> dict[Path, tuple[Item, ...]]:
        """The samples of each source, under its resolved path: what one decode can serve."""
        grouped: dict[Path, list[Item]] = {}
        for item in self.items:
            grouped.setdefault(item.source.path.resolve(), []).append(item)
        return {path: tuple(items) for path, items in grouped.items()}

    def captions(self) -> dict[Path, str | None]:
        """The caption of each text cache file; None where it is not at hand."""
        return {item.text_path: item.source.caption for item in self.items}


def plan_datasets(config: DatasetsConfig, *, sources_may_be_absent: bool = False, write_index: bool = True) -> DataPlan:
    """Find and measure the sources and lay out the samples.

    With `sources_may_be_absent`, as when training, the index or the caches' names stand in for missing sources, and
    captions are not required. `write_index` keeps the measurements beside the caches. Raises one `DataError` that
    lists everything wrong: folders, captions, broken files, colliding names, impossible sizes.
    """
    problems = Problems()
    tables = (*config.datasets, *config.validation)
    indexes = {table.cache_directory: SourceIndex(table.cache_directory) for table in tables}
    found: list[_Found] = []
    for dataset in tables:
        with problems.collect():
            selector_of(dataset)
            found.append(_find(dataset, indexes[dataset.cache_directory], sources_may_be_absent))
    with problems.collect():
        require_distinct((entry.config.cache_directory, source) for entry in found for source in entry.sources)
    plans = [_plan(number, entry, indexes, problems, sources_may_be_absent) for number, entry in enumerate(found)]
    with problems.collect():
        _require_one_content_per_file(plans)
    if write_index:
        _save(indexes, found, forget=not problems)
    problems.raise_all(DataError)
    trained, validated = tuple(plans[: len(config.datasets)]), tuple(plans[len(config.datasets) :])
    validation = DataPlan(path=config.path, datasets=validated) if validated else None
    return DataPlan(path=config.path, datasets=trained, validation=validation)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Found:
    """The sources of one sub-dataset."""

    config: DatasetConfig
    sources: tuple[Source, ...]
    from_index: bool = False


def _find(config: DatasetConfig, index: SourceIndex, may_be_absent: bool) -> _Found:
    if config.source.exists() or not may_be_absent:
        return _Found(config=config, sources=find_sources(config, captions=not may_be_absent))
    return _Found(config=config, sources=index.absent_sources(kind_of(config), config.source), from_index=True)


def _plan(
    number: int, found: _Found, indexes: dict[Path, SourceIndex], problems: Problems, may_be_absent: bool
) -> DatasetPlan:
    cut, unknown = Cut(), []
    infos = measure(found.sources, indexes[found.config.cache_directory])
    for source, info in zip(found.sources, infos, strict=True):
        with problems.collect():
            if isinstance(info, DataError):
                raise info
            if info is None:
                unknown.append(source)
            else:
                cut_source(cut, found.config, number, source, info)
    notes = _notes(cut)
    if unknown and not may_be_absent:
        listed = some([str(source.path) for source in unknown])
        problems.add(f"{found.config.where}: {len(unknown)} sources do not exist: {listed}; check the paths")
    elif unknown or (found.from_index and not found.sources):
        cut.items += items_of_caches(found.config, number, [source.stem for source in unknown] or None)
        notes.append("sources and index are not at hand: the samples are those whose cache files lie there")
    elif found.from_index:
        notes.append(f"{found.config.source} is not at hand: the samples are those of its last caching")
    if not cut.items and not problems:
        problems.add(_nothing(found.config, cut))
    items = {item.name: item for item in sorted(cut.items, key=lambda item: item.name)}
    return DatasetPlan(
        config=found.config, items=tuple(items.values()), shortfalls=tuple(cut.shortfalls), notes=tuple(notes)
    )


def _notes(cut: Cut) -> list[str]:
    return [f"{_clips(len(names))} ({some(names)}): {text}" for text, names in cut.notes.items()]


def _clips(count: int) -> str:
    return "1 clip" if count == 1 else f"{count} clips"


def _nothing(config: DatasetConfig, cut: Cut) -> str:
    if cut.shortfalls:
        longest = max(shortfall.frames for shortfall in cut.shortfalls)
        return (
            f"{config.where}: no clip is long enough for any window: the longest has {longest} frames; "
            "lower target_frames"
        )
    return (
        f"{config.where}: {config.source} is not there and {config.cache_directory} holds no cache that fits; "
        "check the paths or run wan_cache_latents.py"
    )


def _require_one_content_per_file(plans: Iterable[DatasetPlan]) -> None:
    """Two sub-datasets may share a cache folder, but not a file name for two different things."""
    owners: dict[Path, tuple[Item, str]] = {}
    problems = Problems()
    for plan in plans:
        for item in plan.items:
            first, where = owners.setdefault(item.latent_path.resolve(), (item, plan.config.where))
            if (first.pixels, first.indexes, first.resampling) != (item.pixels, item.indexes, item.resampling):
                problems.add(
                    f"{where} and {plan.config.where} would both write {item.latent_path} with different content; "
                    "give each its own cache_directory"
                )
    problems.raise_all(DataError)


def _save(indexes: dict[Path, SourceIndex], found: Sequence[_Found], *, forget: bool) -> None:
    for folder, index in indexes.items():
        here = [entry for entry in found if entry.config.cache_directory == folder]
        if forget and not any(entry.from_index for entry in here):
            index.keep_only(source for entry in here for source in entry.sources)
        index.save()
