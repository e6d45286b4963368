"""From prompts to text features: cleaning, tokens, UMT5.

Each prompt is encoded at its real length and comes back as its own tensor; the transformer pads with zeros itself.
Prompts of like length share a batch, so little is spent on padding, which is masked and changes nothing.
"""

import html
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from wanlora.foundation.errors import CheckpointError, ConfigError
from wanlora.foundation.log import log
from wanlora.foundation.tensor_files import open_tensors
from wanlora.models.wan.tokens import (
    END_ID,
    PAD_ID,
    SentencePieceTokenizer,
    Tokenizer,
    has_sentencepiece,
    read_tokenizer,
)
from wanlora.models.wan.umt5 import UMT5Encoder

MAX_TOKENS = 512
"""What the transformer reads, the end token included."""
_FILES = ("tokenizer.json", "spiece.model")
_REPOSITORY = "google/umt5-xxl"
_EMBEDDED = "spiece_model"
_SHOWN = 60


def clean(text: str) -> str:
    """A prompt as Wan was trained on it: repaired Unicode, plain characters for HTML's, single spaces."""
    import ftfy  # where no prompt is encoded, a start does without it

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


def load_tokenizer(tokenizer: Path | None, t5_path: Path, offline: bool) -> Tokenizer:
    """UMT5's tokenizer, from the first place that has it; the log says which.

    The places: `tokenizer` (a file, or the folder that holds it), `google/umt5-xxl/` beside the text encoder's weights,
    the weights themselves, the Hugging Face hub (with `offline`: its cache on this machine). Raises `ConfigError` for
    a path that leads nowhere and `CheckpointError` if no place has it.
    """
    if tokenizer is not None:
        return _read(_file_in(tokenizer, t5_path))
    folder = t5_path if t5_path.is_dir() else t5_path.parent
    for beside in (folder / _REPOSITORY / name for name in _FILES):
        if beside.is_file():
            return _read(beside)
    return _embedded(t5_path) or _read(_from_hub(t5_path, offline))


class TextEncoder:
    """Prompts to features. The tokenizer must fit the model: ids beyond its vocabulary raise `CheckpointError`."""

    def __init__(self, model: UMT5Encoder, tokenizer: Tokenizer, device: torch.device | str | None = None) -> None:
        if tokenizer.num_ids > model.sizes.vocab:
            raise CheckpointError(
                f"the tokenizer has {tokenizer.num_ids} ids, but the text encoder knows {model.sizes.vocab}: they "
                "belong to different models; pass the tokenizer of these weights with --tokenizer"
            )
        self._model = model
        self._tokenizer = tokenizer
        self._device = model.device if device is None else torch.device(device)

    def encode(self, texts: Sequence[str], batch_size: int = 16) -> list[Tensor]:
        """Features [T, D] of each text, T its number of tokens (at most 512), on the CPU in the model's format.

        Texts are cleaned. One that is too long is cut, keeping the end token, and named in the log.
        """
        ids = [self.tokens(text) for text in texts]
        order = sorted(range(len(ids)), key=lambda index: len(ids[index]), reverse=True)
        features: dict[int, Tensor] = {}
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            features |= zip(batch, self._encode([ids[index] for index in batch]), strict=True)
        return [features[index] for index in range(len(ids))]

    def tokens(self, text: str) -> Tensor:
        """The ids [T] that the model is given for a text."""
        text = clean(text)
        ids = self._tokenizer.ids(text)
        if len(ids) > MAX_TOKENS:
            log.warning(
                f'the text "{text[:_SHOWN]}…" has {len(ids)} tokens; the model reads the first {MAX_TOKENS - 1}, '
                "the rest is cut off"
            )
            ids = [*ids[: MAX_TOKENS - 1], END_ID]
        return torch.tensor(ids)

    def _encode(self, ids: list[Tensor]) -> list[Tensor]:
        lengths = torch.tensor([len(one) for one in ids])
        ids_BT = pad_sequence(ids, batch_first=True, padding_value=PAD_ID)
        mask_BT = torch.arange(ids_BT.shape[1]) < lengths[:, None]
        mask = None if bool(mask_BT.all()) else mask_BT.to(self._device)
        features_BTD = self._model(ids_BT.to(self._device), mask).cpu()
        return [rows[:length].clone() for rows, length in zip(features_BTD, lengths.tolist(), strict=True)]


def _read(path: Path) -> Tokenizer:
    tokenizer = read_tokenizer(path)
    log.info(f"tokenizer: {path}")
    return tokenizer


def _file_in(path: Path, t5_path: Path) -> Path:
    """The tokenizer's file at `path` or in the folder `path`."""
    places = [path] if path.is_file() else [path / name for name in _FILES]
    for place in places:
        if place.is_file():
            return place
    what = f"holds neither {' nor '.join(_FILES)}" if path.is_dir() else "does not exist"
    raise ConfigError(f"--tokenizer: {path} {what}; {_cure(t5_path.parent)}")


def _embedded(t5_path: Path) -> Tokenizer | None:
    """The tokenizer inside ComfyUI's text encoder files, if it is there and can be read."""
    with open_tensors(t5_path) as source:
        if _EMBEDDED not in source.names:
            return None
        if not has_sentencepiece():
            log.info(f"{t5_path} has a tokenizer inside, but sentencepiece, which reads it, is not installed")
            return None
        model = source.read(_EMBEDDED).numpy().tobytes()
    log.info(f"tokenizer: inside {t5_path}")
    return SentencePieceTokenizer(model, t5_path)


def _from_hub(t5_path: Path, offline: bool) -> Path:
    from huggingface_hub import hf_hub_download  # hardly ever needed, and slow to import
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    try:
        return Path(hf_hub_download(_REPOSITORY, _FILES[0], local_files_only=offline))
    except (OSError, ValueError, EntryNotFoundError, HfHubHTTPError) as error:
        why = "--offline forbids fetching it" if offline else f"huggingface.co could not give it ({_first_line(error)})"
        raise CheckpointError(
            f"the tokenizer of the text encoder is not on this machine and {why}; {_cure(t5_path.parent)}"
        ) from error


def _cure(folder: Path) -> str:
    return (
        f"fetch https://huggingface.co/{_REPOSITORY}/resolve/main/{_FILES[0]} (the Wan-AI repositories have the same "
        f"file in {_REPOSITORY}/) and save it as {folder / _REPOSITORY / _FILES[0]}, or anywhere and pass "
        "--tokenizer PATH"
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
