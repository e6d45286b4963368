"""The samples of one sub-dataset: every source, every distinct window, at its bucket.

Pure but for one case: where neither sources nor index are at hand, the samples are read from the names of the cache
files, keeping those that the sub-dataset could have asked for.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from wanlora.config.dataset import DatasetConfig, VideoDatasetConfig
from wanlora.data.buckets import BucketSelector, Size
from wanlora.data.cache_files import LatentName, LatentStamp, text_name
from wanlora.data.info import VideoInfo
from wanlora.data.rates import Resampling, resample
from wanlora.data.sources import Source, kind_of
from wanlora.data.windows import Extraction, Window
from wanlora.foundation.errors import DataError
from wanlora.foundation.shapes import PixelShape


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One sample: a picture, or a window of a clip, at one size."""

    dataset: int
    """Number of its table in the file, from 0; those of the validation come last."""
    source: Source
    pixels: PixelShape
    original: Size
    """Size of the source as shown; of the bucket where only caches are at hand."""
    window: Window | None
    """None for pictures."""
    latent_path: Path
    text_path: Path
    indexes: tuple[int, ...] = (0,)
    """Source frames, ascending, one may repeat; empty where only caches are at hand."""
    resampling: str | None = ""
    """The rule by which frames were chosen; None where it is not known."""
    info: VideoInfo | None = None
    """What measuring found; None where only caches are at hand."""

    @property
    def name(self) -> str:
        """Name of the latent cache file, and of the sample in messages."""
        return self.latent_path.name

    def stamp(self, *, vae: str | None = None, vae_dtype: str | None = None, dtype: str | None = None) -> LatentStamp:
        """What its latent cache has to be made of; what is None is not compared."""
        return LatentStamp(
            pixels=self.pixels,
            original=self.original,
            window=self.window,
            resampling=self.resampling,
            vae=vae,
            vae_dtype=vae_dtype,
            dtype=dtype,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Shortfall:
    """A clip that yields fewer distinct windows than its sub-dataset asks for."""

    source: Path
    frames: int
    """Frames to cut windows from, after resampling."""
    frames_in_file: int
    asked: int
    got: int
    reason: str

    def __str__(self) -> str:
        resampled = f" after resampling {self.frames_in_file}" if self.frames != self.frames_in_file else ""
        return f"{self.source.name}: {self.frames} frames{resampled}, {self.got} of {self.asked} windows: {self.reason}"


@dataclass(kw_only=True, slots=True)
class Cut:
    """What a sub-dataset yields."""

    items: list[Item] = field(default_factory=list)
    shortfalls: list[Shortfall] = field(default_factory=list)
    notes: dict[str, list[str]] = field(default_factory=dict)
    """What there is to tell about sources, and the names of those it concerns."""

    def note(self, text: str, source: Source) -> None:
        """Remember to tell `text` about `source`."""
        self.notes.setdefault(text, []).append(source.path.name)


def extraction_of(config: VideoDatasetConfig) -> Extraction:
    """How a table of the TOML cuts windows."""
    return Extraction(
        mode=config.frame_extraction,
        targets=config.target_frames,
        stride=config.frame_stride,
        sample=config.frame_sample,
        max_frames=config.max_frames,
    )


def selector_of(config: DatasetConfig) -> BucketSelector:
    """How a table of the TOML chooses sizes. Raises `DataError` for an impossible resolution."""
    try:
        return BucketSelector(
            resolution=config.resolution, enabled=config.enable_bucket, no_upscale=config.bucket_no_upscale
        )
    except DataError as error:
        raise DataError(f"{config.where}: {error}") from error


def cut_source(cut: Cut, config: DatasetConfig, dataset: int, source: Source, info: VideoInfo) -> None:
    """Add the samples of one measured source. Raises `DataError` for one that is too small."""
    try:
        size = selector_of(config).select(info.size)
    except DataError as error:
        raise DataError(f"{source.path}: {error}") from error
    if not isinstance(config, VideoDatasetConfig):
        cut.items.append(_item(config, dataset, source, info, size, None, Resampling((0,))))
        return
    resampling = resample(info.times, rate=info.rate, source_fps=config.source_fps, target_fps=config.target_fps)
    if resampling.note:
        cut.note(resampling.note, source)
    if size != BucketSelector(resolution=config.resolution, enabled=True).select(info.size):
        cut.note("enable_bucket and bucket_no_upscale hold for clips too (musubi ignores them when caching)", source)
    extraction, num_frames = extraction_of(config), len(resampling.indexes)
    for window in extraction.distinct(num_frames):
        cut.items.append(_item(config, dataset, source, info, size, window, resampling))
    lack = extraction.shortfall(num_frames)
    if lack is not None:
        cut.shortfalls.append(
            Shortfall(
                source=source.path,
                frames=num_frames,
                frames_in_file=info.num_frames,
                asked=lack.asked,
                got=lack.got,
                reason=lack.reason,
            )
        )


def items_of_caches(config: DatasetConfig, dataset: int, stems: Iterable[str] | None = None) -> Iterator[Item]:
    """The samples whose cache files a sub-dataset could have asked for, by name; of `stems` alone if given."""
    wanted = None if stems is None else set(stems)
    folder = config.cache_directory
    for path in sorted(folder.iterdir() if folder.is_dir() else (), key=lambda path: path.name):
        name = LatentName.parse(path.name)
        if name is None or path.name.startswith(".") or (wanted is not None and name.stem not in wanted):
            continue
        pixels = _asked_pixels(config, name)
        if pixels is not None:
            yield Item(
                dataset=dataset,
                source=Source(path=config.source / name.stem, kind=kind_of(config)),
                pixels=pixels,
                original=name.size,
                window=name.window,
                latent_path=path,
                text_path=folder / text_name(name.stem),
                indexes=(),
                resampling=None,
            )


def _item(
    config: DatasetConfig,
    dataset: int,
    source: Source,
    info: VideoInfo,
    size: Size,
    window: Window | None,
    resampling: Resampling,
) -> Item:
    start, frames = (window.start, window.frames) if window else (0, 1)
    name = LatentName(source.stem, size if window else info.size, window)
    return Item(
        dataset=dataset,
        source=source,
        pixels=PixelShape(*size, frames),
        original=info.size,
        window=window,
        latent_path=config.cache_directory / str(name),
        text_path=config.cache_directory / text_name(source.stem),
        indexes=resampling.indexes[start : start + frames],
        resampling=resampling.rule,
        info=info,
    )


def _asked_pixels(config: DatasetConfig, name: LatentName) -> PixelShape | None:
    """The size at which a sub-dataset trains the cache called `name`; None if it does not ask for it."""
    selector = selector_of(config)
    if not isinstance(config, VideoDatasetConfig):
        return None if name.window else PixelShape(*selector.select(name.size))
    if name.window is None or not extraction_of(config).could_yield(name.window):
        return None
    kept_size = selector.enabled and selector.no_upscale and selector.select(name.size) == name.size
    return PixelShape(*name.size, name.window.frames) if name.size in selector.sizes or kept_size else None
