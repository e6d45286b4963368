"""Text embeddings for previews: encoded once at the start, by one process, before the transformer is loaded."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from wanlora.config.train import ModelConfig
from wanlora.foundation.errors import MemoryPlanError
from wanlora.foundation.garbage import return_memory
from wanlora.foundation.log import log
from wanlora.memory.measure import is_out_of_memory
from wanlora.models.wan.text import TextEncoder, load_tokenizer
from wanlora.models.wan.umt5 import load_umt5


def encode_texts(texts: Sequence[str], model: ModelConfig, device: torch.device) -> dict[str, Tensor]:
    """The embedding [T, D] of every distinct text, on the CPU. The encoder is gone again when this returns."""
    distinct = sorted(set(texts))
    if not distinct:
        return {}
    t5: Path | None = model.t5
    assert t5 is not None
    log.info(f"encoding {len(distinct)} preview texts with {t5.name}")
    tokenizer = load_tokenizer(model.tokenizer, t5, model.offline)
    try:
        encoder = TextEncoder(load_umt5(t5, device=device, fp8=model.fp8_t5), tokenizer)
        embeddings = {text: embedding.cpu() for text, embedding in zip(distinct, encoder.encode(distinct), strict=True)}
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        cure = "leave out --sample_prompts" if model.fp8_t5 else "add --fp8_t5"
        raise MemoryPlanError(
            f"the text encoder for previews does not fit the card's memory; {cure}, or lower --vram_reserve"
        ) from error
    del encoder
    return_memory(device)
    return embeddings
