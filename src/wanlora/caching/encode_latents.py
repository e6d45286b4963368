"""Encoding the latents that are missing: decoding threads ahead, batches of one shape, files written as they come.

Each source is decoded once for all its windows, sizes and dataset files.
"""

from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from wanlora.caching.ahead import Failed, read_ahead
from wanlora.caching.encoding import Encoded, LatentEncoder
from wanlora.caching.requests import Request
from wanlora.caching.start import decoding_threads
from wanlora.caching.work import Summary, Task, Work, writing
from wanlora.config.caching import LatentCacheConfig
from wanlora.data.cache_files import source_fingerprint
from wanlora.data.cache_tensors import write_latents
from wanlora.data.media import read_items
from wanlora.data.resize import Clip
from wanlora.foundation.devices import find_device, place
from wanlora.foundation.dtypes import dtype_name, parse_dtype
from wanlora.foundation.files import Fingerprint
from wanlora.foundation.log import log
from wanlora.memory.limit import limit_card
from wanlora.models.wan.vae import load_vae


@dataclass(frozen=True, kw_only=True, slots=True)
class _Source:
    """Everything that is wanted of one file."""

    path: Path
    tasks: tuple[Task, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sample:
    """Pixels that wait to be encoded."""

    task: Task
    clip: Clip
    source: Fingerprint


def encode_latents(config: LatentCacheConfig, requests: tuple[Request, ...], work: Work, vae: str) -> None:
    """Encode what `work` has to do with the VAE whose fingerprint is `vae`.

    Raises `MemoryPlanError` if the VAE does not fit. After Ctrl-C every file written is whole.
    """
    assert config.vae is not None
    device = find_device(config.device)
    limit_card(device, reserve=None, at_most=None, adjustable=False)
    log.info(f"the VAE computes in {config.maths} on {place(device)}; latents are stored in {config.storage}")
    model = load_vae(config.vae, device=device, dtype=parse_dtype(config.maths), cache_on_cpu=config.vae_cache_cpu)
    encoder = LatentEncoder(
        model,
        storage=parse_dtype(config.storage),
        cudnn=not config.disable_cudnn_backend,
        tiling=config.vae_tiling,
    )
    threads = decoding_threads(config.num_workers)
    try:
        with (
            tqdm(total=len(work.to_do), unit="sample", desc="latents", dynamic_ncols=True) as bar,
            closing(read_ahead(_by_source(work.to_do), _read, workers=threads)) as results,
            _Writer(vae, encoder.maths, work.summary, bar) as writer,
        ):
            for batch in _batches(_readable(results, work.summary, bar), config.batch_size, requests):
                writer.take(batch, encoder.encode([sample.clip for sample in batch]))
    except KeyboardInterrupt:
        log.info(f"stopped: {work.summary.written} of {len(work.to_do)} are written and whole; run again to go on")
        raise


def _by_source(tasks: Iterable[Task]) -> list[_Source]:
    grouped: dict[Path, list[Task]] = {}
    for task in tasks:
        grouped.setdefault(task.item.source.path.resolve(), []).append(task)
    return [_Source(path=path, tasks=tuple(group)) for path, group in grouped.items()]


def _read(source: _Source) -> Iterator[_Sample]:
    """The pixels of all tasks of a source, in one pass."""
    print_of_source = source_fingerprint(source.path)
    tasks = {task.item.latent_path: task for task in source.tasks}
    for item, clip in read_items([task.item for task in source.tasks]):
        yield _Sample(task=tasks[item.latent_path], clip=clip, source=print_of_source)


def _readable(results: Iterable[_Sample | Failed[_Source]], summary: Summary, bar: "tqdm[Any]") -> Iterator[_Sample]:
    """The samples; what cannot be read is named at once and counted."""
    received: set[Path] = set()
    for result in results:
        if isinstance(result, _Sample):
            received.add(result.task.path)
            yield result
            continue
        lost = [task for task in result.job.tasks if task.path not in received]
        log.error(str(result.error))
        summary.failed(lost, str(result.error))
        bar.update(len(lost))


def _batches(
    samples: Iterable[_Sample], batch_size: int | None, requests: tuple[Request, ...]
) -> Iterator[list[_Sample]]:
    """Samples of one shape, up to `batch_size` of them or as many as their dataset trains at once."""
    waiting: dict[tuple[object, int], list[_Sample]] = {}
    for sample in samples:
        limit = batch_size or _dataset_batch_size(sample.task, requests)
        batch = waiting.setdefault((sample.task.item.pixels, limit), [])
        batch.append(sample)
        if len(batch) == limit:
            yield waiting.pop((sample.task.item.pixels, limit))
    yield from waiting.values()


def _dataset_batch_size(task: Task, requests: tuple[Request, ...]) -> int:
    plan = requests[task.requests[0]].plan
    assert plan is not None
    return plan.tables[task.item.dataset].config.batch_size


class _Writer:
    """Writes a batch when the next has been begun, which the card encodes meanwhile; and the last one at the end."""

    def __init__(self, vae: str, maths: torch.dtype, summary: Summary, bar: "tqdm[Any]") -> None:
        self._vae, self._maths, self._summary, self._bar = vae, maths, summary, bar
        self._waiting: tuple[list[_Sample], Encoded] | None = None

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *error: object) -> None:
        self._flush()

    def take(self, batch: list[_Sample], encoded: Encoded) -> None:
        """Write the last batch and keep this one."""
        self._flush()
        self._waiting = batch, encoded

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting is None:
            return
        batch, encoded = waiting
        for sample, latents_CFHW in zip(batch, encoded.latents(), strict=True):
            self._write(sample, latents_CFHW)
        self._bar.update(len(batch))

    def _write(self, sample: _Sample, latents_CFHW: Tensor) -> None:
        item = sample.task.item
        stamp = item.stamp(vae=self._vae, vae_dtype=dtype_name(self._maths), dtype=dtype_name(latents_CFHW.dtype))
        with writing(sample.task, self._summary):
            write_latents(item.latent_path, latents_CFHW, stamp, sample.source)
