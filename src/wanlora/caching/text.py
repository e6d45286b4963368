"""wan_cache_text_encoder_outputs.py: the caption of every source, as the rows that the transformer reads.

Each distinct caption is encoded once, whichever sources, sub-datasets and dataset files share it, and written once for
each source, where all its windows find it.
"""

from wanlora.caching.requests import read_requests, report
from wanlora.caching.start import check_flags, check_model, identity
from wanlora.caching.work import Summary, lay_out
from wanlora.config.caching import TextCacheConfig
from wanlora.data.cache_files import text_is_fresh
from wanlora.foundation.errors import Problems
from wanlora.foundation.log import log


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
        from wanlora.caching.encode_text import encode_text  # brings torch, which a rerun does without

        encode_text(config, work, t5 or "", batch_size)
    work.summary.finish()
    return work.summary


def _identity(config: TextCacheConfig) -> str | None:
    """What tells this text encoder from others; in fp8 it computes something else."""
    digest = identity(config.t5)
    return f"{digest}+fp8" if digest and config.fp8_t5 else digest
