"""What kind of weights a file holds, told by the names of its tensors.

Wan needs three to five files whose names people mix up, and other model families use the same words for theirs. A
loader that meets a stranger asks here, so that its error can say what the file is and which flag it belongs to.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from wanlora.foundation.errors import CheckpointError
from wanlora.foundation.headers import stored_names


@dataclass(frozen=True, kw_only=True, slots=True)
class FileKind:
    """One kind of weights file."""

    name: str
    """With its article: `the Wan 2.1 VAE`."""
    flag: str | None
    """The flag that takes such a file; None where wanlora has no use for it."""
    matches: Callable[["_Names"], bool]

    def __str__(self) -> str:
        return self.name if self.flag is None else f"{self.name} (it belongs to {self.flag})"


class _Names:
    """Tensor names, searched by part: the prefixes that repackers add do not matter."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = [f".{name}." for name in names]

    def have(self, *parts: str) -> bool:
        """Whether each part occurs in some name, at the boundaries of its words."""
        return all(any(f".{part}." in name for name in self._names) for part in parts)


_KINDS = (
    FileKind(
        name="a LoRA",
        flag="--network_weights or --base_weights",
        matches=lambda names: (
            names.have("lora_down.weight") or names.have("lora_A.weight") or names.have("lora_A.default.weight")
        ),
    ),
    FileKind(
        name="a Wan transformer",
        flag="--dit",
        matches=lambda names: (
            names.have("patch_embedding", "blocks.0.self_attn.q.weight")
            or names.have("condition_embedder.text_embedder.linear_1.weight")
        ),
    ),
    FileKind(
        name="the UMT5 text encoder",
        flag="--t5",
        matches=lambda names: (
            names.have("blocks.0.pos_embedding.embedding.weight")
            or names.have("block.1.layer.0.SelfAttention.relative_attention_bias.weight")
        ),
    ),
    FileKind(
        name="a T5 text encoder of another model family (Wan needs UMT5)",
        flag=None,
        matches=lambda names: names.have("block.0.layer.0.SelfAttention.q.weight"),
    ),
    FileKind(
        name="the Wan 2.2 VAE, which serves the TI2V-5B model only",
        flag=None,
        matches=lambda names: (
            names.have("encoder.downsamples.0.downsamples") or names.have("encoder.down_blocks.0.resnets.0.norm1.gamma")
        ),
    ),
    FileKind(
        name="the Wan 2.1 VAE",
        flag="--vae",
        matches=lambda names: (
            names.have("encoder.downsamples.0.residual.0.gamma") or names.have("encoder.down_blocks.0.norm1.gamma")
        ),
    ),
    FileKind(
        name="a Stable Diffusion checkpoint",
        flag=None,
        matches=lambda names: names.have("diffusion_model.input_blocks"),
    ),
    FileKind(
        name="a VAE of another model family (Stable Diffusion, Flux and others name theirs so)",
        flag=None,
        matches=lambda names: names.have("encoder.down.0.block.0") or names.have("encoder.down_blocks.0.resnets"),
    ),
    FileKind(
        name="a CLIP image encoder",
        flag="--clip",
        matches=lambda names: (
            names.have("visual.transformer.0")
            or names.have("vision_model.encoder.layers.0")
            or names.have("visual.transformer.resblocks.0")
        ),
    ),
)


def file_kind(names: Iterable[str]) -> FileKind | None:
    """The kind that a file with these tensor names is of, or None for a stranger."""
    searched = _Names(names)
    return next((kind for kind in _KINDS if kind.matches(searched)), None)


def describe(names: Iterable[str]) -> str:
    """What a file with these tensor names is, as the middle of a sentence: `is a LoRA (it belongs to …)`."""
    listed = list(names)
    kind = file_kind(listed)
    if kind is not None:
        return f"is {kind}"
    sample = ", ".join(listed[:3]) or "none"
    return f"is of no kind known here (its first tensors: {sample})"


def require_kind(path: Path, flag: str) -> None:
    """Raise `CheckpointError` unless the file at `path` is of the kind that `flag` takes, by its header."""
    names = stored_names(path)
    kind = file_kind(names)
    if kind is None or kind.flag != flag:
        raise CheckpointError(f"{flag} {path} {describe(names)}; pass the file that belongs to {flag}")
