"""What both caching commands check and settle before they read a dataset file."""

import os
from pathlib import Path

from wanlora.config.caching import CacheConfig
from wanlora.config.checks import check_paths
from wanlora.data.cache_files import source_fingerprint
from wanlora.foundation.errors import Problems
from wanlora.foundation.log import say_once
from wanlora.models.wan.recognise import require_kind

_MOST_THREADS = 4
"""Decoders use several threads each, and every reader holds a clip in memory."""


def check_flags(config: CacheConfig, problems: Problems) -> None:
    """Collect what is wrong with files and device, and answer the flags that change nothing."""
    with problems.collect():
        check_paths(config)
    if config.device not in (None, "cpu"):
        from wanlora.foundation.devices import find_device  # brings torch, which a rerun does without

        with problems.collect():
            find_device(config.device)
    if config.skip_existing:
        say_once("--skip_existing changes nothing: files that still fit are always kept, and only those")
    if config.keep_cache:
        say_once("--keep_cache changes nothing: cache files are never deleted")


def check_model(path: Path | None, flag: str, problems: Problems) -> None:
    """Collect what is wrong with the file behind `flag`, if it is there: its header shows what it is."""
    if path is not None and path.exists():
        with problems.collect():
            require_kind(path, flag)


def identity(path: Path | None) -> str | None:
    """What tells the model at `path`, a file or a folder, from another; the same wherever the file lies."""
    return None if path is None else source_fingerprint(path).digest


def decoding_threads(num_workers: int | None) -> int:
    """How many sources are read at the same time."""
    return min((os.cpu_count() or 2) - 1, _MOST_THREADS) if num_workers is None else num_workers
