"""Texts of previews that cannot be encoded."""

from pathlib import Path

import pytest
import torch

from wanlora.config.train import ModelConfig
from wanlora.foundation.errors import MemoryPlanError
from wanlora.training import conditioning


@pytest.mark.parametrize(("fp8", "cure"), [(False, "add --fp8_t5"), (True, "leave out --sample_prompts")])
def test_an_encoder_that_does_not_fit_is_named_with_what_helps(
    fp8: bool, cure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_much(*arguments: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(conditioning, "load_tokenizer", lambda *arguments: None)
    monkeypatch.setattr(conditioning, "load_umt5", too_much)
    model = ModelConfig(t5=Path("umt5.safetensors"), fp8_t5=fp8)
    with pytest.raises(MemoryPlanError, match=f"{cure}, or lower --vram_reserve"):
        conditioning.encode_texts(["a cat"], model, torch.device("cpu"))
