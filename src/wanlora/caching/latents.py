"""wan_cache_latents.py: every sample that the dataset files ask for, as latents on disk.

First everything is read and checked, then said, then done: no model is loaded for nothing, and no video is opened that
a former run has measured. Each source is decoded once for all its windows, sizes and dataset files.
"""

from wanlora.caching.requests import Request, read_requests, report
from wanlora.caching.start import check_flags, check_model, identity
from wanlora.caching.work import Summary, lay_out
from wanlora.config.caching import LatentCacheConfig
from wanlora.data.cache_files import latent_is_fresh
from wanlora.data.items import Item
from wanlora.foundation.errors import Problems
from wanlora.foundation.log import log


def cache_latents(config: LatentCacheConfig) -> Summary:
    """Encode what is missing or has changed.

    Raises `ConfigError` before anything is done, listing every problem of flags and dataset files; `DataError` at the
    end if something could not be cached; `MemoryPlanError` if the VAE does not fit.
    """
    problems = Problems()
    check_flags(config, problems)
    check_model(config.vae, "--vae", problems)
    requests = read_requests(config.dataset_config, problems, write_index=not config.dry_run)
    report(requests)
    if config.debug_mode is not None:
        from wanlora.caching.preview import show  # brings the decoders, which a rerun does without

        show(_items(requests), config.debug_mode, width=config.console_width, limit=config.console_num_images)
        return Summary.of(requests)
    vae = identity(config.vae)
    work = lay_out(
        requests,
        path_of=lambda item: item.latent_path,
        content_of=lambda item: (item.source.path.resolve(), item.stamp(), item.indexes),
        difference=lambda item: _difference(item, config, vae),
    )
    work.announce("latents")
    if config.dry_run:
        log.info("dry run: nothing is written")
    elif work.to_do:
        from wanlora.caching.encode_latents import encode_latents  # brings torch, which a rerun does without

        encode_latents(config, requests, work, vae or "")
    work.summary.finish()
    return work.summary


def _difference(item: Item, config: LatentCacheConfig, vae: str | None) -> str | None:
    """Why the cache of `item` has to be made. Without --vae_dtype any stored format will do."""
    stamp = item.stamp(
        vae=vae,
        vae_dtype=config.maths,
        dtype=None if config.vae_dtype is None else config.storage,
    )
    return latent_is_fresh(item.latent_path, stamp, item.source.path)


def _items(requests: tuple[Request, ...]) -> list[Item]:
    """Every sample of every dataset file, each cache file once."""
    return list(
        {item.latent_path: item for request in requests if request.plan for item in request.plan.cached_items}.values()
    )
