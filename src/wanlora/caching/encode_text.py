"""Encoding the captions that are missing: each distinct one once, the longest first."""

from collections.abc import Sequence

import torch
from tqdm import tqdm

from wanlora.caching.work import Task, Work, writing
from wanlora.config.caching import TextCacheConfig
from wanlora.data.cache_tensors import write_text
from wanlora.data.sources import some
from wanlora.foundation.devices import find_device, place
from wanlora.foundation.errors import MemoryPlanError
from wanlora.foundation.log import log
from wanlora.models.wan.text import MAX_TOKENS, TextEncoder, clean, load_tokenizer
from wanlora.models.wan.tokens import Tokenizer
from wanlora.models.wan.umt5 import load_umt5


def encode_text(config: TextCacheConfig, work: Work, t5: str, batch_size: int) -> None:
    """Encode what `work` has to do with the text encoder whose fingerprint is `t5`.

    Raises `MemoryPlanError` if the text encoder does not fit. After Ctrl-C every file written is whole.
    """
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
