"""wan_cache_text_encoder_outputs.py: the caption of every source, as the rows that the transformer reads.

Each distinct caption is encoded once, whichever sources, sub-datasets and dataset files share it, and written once for
each source, where all its windows find it.
"""

from collections.abc import Sequence

import torch
from tqdm import tqdm

from wanlora.caching.requests import read_requests, report
from wanlora.caching.start import check_flags, check_model, identity, place
from wanlora.caching.work import Summary, Task, Work, lay_out, writing
from wanlora.config.caching import TextCacheConfig
from wanlora.data.cache_files import text_is_fresh, write_text
from wanlora.data.sources import some
from wanlora.foundation.devices import find_device
from wanlora.foundation.errors import MemoryPlanError, Problems
from wanlora.foundation.log import log
from wanlora.models.wan.text import MAX_TOKENS, TextEncoder, clean, load_tokenizer
from wanlora.models.wan.tokens import Tokenizer
from wanlora.models.wan.umt5 import load_umt5


def cache_text(config: TextCacheConfig) -> Summary:
    """Encode the captions that are missing or have changed.

    Raises `ConfigError` before anything is done, listing every problem of flags and dataset files; `DataError` at the
    end if something could not be cached; `MemoryPlanError` if the text encoder does not fit.
    """
    problems = Problems()
    check_flags(config, problems)
    check_model(config.t5, "--t5", problems)
    requests = read_requests(config.dataset_config, problems, write_index=not config.dry_run)
    report(requests)
    t5 = _identity(config)
    work = lay_out(
        requests,
        path_of=lambda item: item.text_path,
        content_of=lambda item: item.source.caption,
        difference=lambda item: text_is_fresh(item.text_path, caption=item.source.caption, t5=t5),
    )
    work.announce("captions")
    if config.dry_run:
        log.info("dry run: nothing is written")
    elif work.to_do:
        batch_size = config.batch_size or max(
            dataset.config.batch_size for request in requests if request.plan for dataset in request.plan.tables
        )
        _encode(config, work, t5 or "", batch_size)
    work.summary.finish()
    return work.summary


def _identity(config: TextCacheConfig) -> str | None:
    """What tells this text encoder from others; in fp8 it computes something else."""
    digest = identity(config.t5)
    return f"{digest}+fp8" if digest and config.fp8_t5 else digest


def _encode(config: TextCacheConfig, work: Work, t5: str, batch_size: int) -> None:
    assert config.t5 is not None
    tokenizer = load_tokenizer(config.tokenizer, config.t5, config.offline)
    _name_long_captions(work.to_do, tokenizer)
    by_caption = _by_caption(work.to_do)
    captions = sorted(by_caption, key=len, reverse=True)
    log.info(f"{len(work.to_do)} files share {len(captions)} distinct captions")
    device = find_device(config.device)
    log.info(f"the text encoder runs on {place(device)}" + (", weights in fp8" if config.fp8_t5 else ""))
    try:
        encoder = TextEncoder(load_umt5(config.t5, device=device, fp8=config.fp8_t5), tokenizer)
        with tqdm(total=len(captions), unit="caption", desc="text", dynamic_ncols=True) as bar:
            for start in range(0, len(captions), batch_size):
                batch = captions[start : start + batch_size]
                for caption, text_TD in zip(batch, encoder.encode(batch, batch_size), strict=True):
                    for task in by_caption[caption]:
                        with writing(task, work.summary):
                            write_text(task.path, text_TD, caption=caption, t5=t5)
                bar.update(len(batch))
    except torch.OutOfMemoryError as error:
        raise MemoryPlanError(
            "the text encoder does not fit into the GPU's memory; run again with --fp8_t5, a smaller --batch_size or "
            "--device cpu"
        ) from error
    except KeyboardInterrupt:
        log.info(f"stopped: {work.summary.written} of {len(work.to_do)} are written and whole; run again to go on")
        raise


def _by_caption(tasks: Sequence[Task]) -> dict[str, list[Task]]:
    grouped: dict[str, list[Task]] = {}
    for task in tasks:
        assert task.item.source.caption is not None
        grouped.setdefault(task.item.source.caption, []).append(task)
    return grouped


def _name_long_captions(tasks: Sequence[Task], tokenizer: Tokenizer) -> None:
    long = [
        task.item.source.path.name
        for task in tasks
        if len(tokenizer.ids(clean(task.item.source.caption or ""))) > MAX_TOKENS
    ]
    if long:
        log.warning(f"{len(long)} captions are longer than {MAX_TOKENS} tokens and will be cut: {some(long)}")
