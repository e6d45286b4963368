"""What a plan tells its user: the size of an epoch as a sum that can be checked, and every clip that falls short."""

from collections.abc import Sequence

from wanlora.config.dataset import VideoDatasetConfig
from wanlora.data.plan import DataPlan, DatasetPlan
from wanlora.data.sources import Source, some

_SHAPES_LISTED = 8


def report_lines(plan: DataPlan) -> list[str]:
    """Notes by sub-dataset, then every shortfall with its reason, then the sizes, the epoch and the validation."""
    lines = [f"{dataset.config.where}: {note}" for dataset in plan.tables for note in dataset.notes]
    for dataset in plan.tables:
        if dataset.shortfalls:
            count = len(dataset.shortfalls)
            clips = "1 clip yields" if count == 1 else f"{count} clips yield"
            lines.append(f"{dataset.config.where}: {clips} fewer windows than asked:")
            lines += [f"  {shortfall}" for shortfall in dataset.shortfalls]
    lines += [_sizes_line(dataset) for dataset in plan.tables]
    lines.append(epoch_line(plan))
    if plan.validation:
        lines.append(validation_line(plan.validation))
    if plan.overlap:
        lines.append(_overlap_line(plan.overlap))
    return lines


def epoch_line(plan: DataPlan) -> str:
    """`epoch: 120 images x 1 + 240 clips x 2 windows (1, 21 frames) - 2 = 598 samples in 598 batches`."""
    batches = "1 batch" if plan.num_batches == 1 else f"{plan.num_batches} batches"
    return f"epoch: {_sum(plan)} in {batches}"


def validation_line(plan: DataPlan) -> str:
    """`validation: 4 images x 1 + 8 clips x 1 window (21 frames) = 12 samples`, of a file's validation."""
    return f"validation: {_sum(plan)}"


def _sum(plan: DataPlan) -> str:
    """`120 images x 1 + 240 clips x 2 windows (1, 21 frames) - 2 = 598 samples`."""
    terms = " + ".join(_term(dataset) for dataset in plan.datasets)
    missing = sum(
        (shortfall.asked - shortfall.got) * dataset.repeats
        for dataset in plan.datasets
        for shortfall in dataset.shortfalls
        if isinstance(dataset.config, VideoDatasetConfig) and _is_fixed(dataset.config)
    )
    less = f" - {missing}" if missing else ""
    return f"{terms}{less} = {plan.num_samples} {_plural('sample', plan.num_samples)}"


def _overlap_line(sources: Sequence[Source]) -> str:
    count, kinds = len(sources), {source.kind for source in sources}
    noun = (
        _plural({"image": "image", "video": "clip"}[sources[0].kind], count) if len(kinds) == 1 else "images and clips"
    )
    names = some([source.path.name for source in sources])
    verb = "is" if count == 1 else "are"
    return f"{count} validation {noun} {verb} also trained on ({names}): their loss says nothing about unseen ones"


def _term(dataset: DatasetPlan) -> str:
    config, count = dataset.config, dataset.num_sources
    if not isinstance(config, VideoDatasetConfig):
        return f"{count} {_plural('image', count)} x {dataset.repeats}"
    if all(item.info is None for item in dataset.items):
        return f"{len(dataset.items)} cached windows x {dataset.repeats}"
    repeats = f" x {dataset.repeats} repeats" if dataset.repeats > 1 else ""
    frames = "" if config.frame_extraction == "full" else f" ({', '.join(map(str, config.target_frames))} frames)"
    clips = f"{count} {_plural('clip', count)}"
    if not _is_fixed(config):
        return f"{len(dataset.items)} {config.frame_extraction} windows{frames} of {clips}{repeats}"
    asked = _windows_per_clip(config)
    return f"{clips} x {asked} {_plural('window', asked)}{frames}{repeats}"


def _is_fixed(config: VideoDatasetConfig) -> bool:
    """Whether every long enough clip yields the same number of windows."""
    return config.frame_extraction not in ("chunk", "slide")


def _windows_per_clip(config: VideoDatasetConfig) -> int:
    if config.frame_extraction == "full":
        return 1
    return len(config.target_frames) * (config.frame_sample if config.frame_extraction == "uniform" else 1)


def _sizes_line(dataset: DatasetPlan) -> str:
    sizes = sorted(dataset.buckets.items(), key=lambda entry: (-entry[1], entry[0]))
    listed = ", ".join(f"{shape} ({count})" for shape, count in sizes[:_SHAPES_LISTED])
    more = f" and {len(sizes) - _SHAPES_LISTED} more sizes" if len(sizes) > _SHAPES_LISTED else ""
    counted = f"{dataset.num_samples} {_plural('sample', dataset.num_samples)}"
    return f"{dataset.config.where}: {counted}, width x height x frames (samples): {listed}{more}"


def _plural(noun: str, count: int) -> str:
    return noun if count == 1 else noun + "s"
