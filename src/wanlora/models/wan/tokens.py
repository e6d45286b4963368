"""UMT5's tokenizer, from either of the two files that hold it.

`tokenizer.json` is read with the `tokenizers` library; it is what the official code uses. `spiece.model` is the same
vocabulary as SentencePiece wrote it, and needs the `sentencepiece` package. Both give pieces of a unigram model with
pad 0, end 1 and unknown 3, and bytes for characters that the vocabulary lacks.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from wanlora.foundation.errors import CheckpointError, ConfigError

PAD_ID = 0
END_ID = 1


class Tokenizer(Protocol):
    """Text to ids."""

    num_ids: int
    """All ids are below this."""

    def ids(self, text: str) -> list[int]:
        """The ids of a cleaned text, the end's id last, however many there are."""


class JsonTokenizer:
    """A `tokenizer.json`. Raises `CheckpointError` for a broken file and for another model's tokenizer."""

    def __init__(self, path: Path) -> None:
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8-sig"))
        except Exception as error:  # the library raises nothing more specific
            raise CheckpointError(f"{path} is no tokenizer.json ({error}); fetch it again") from error
        _require_ends(path, pad=self._tokenizer.token_to_id("<pad>"), end=self._tokenizer.token_to_id("</s>"))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.num_ids = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    def ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return [*ids, END_ID]


class SentencePieceTokenizer:
    """The bytes of a `spiece.model`; `origin` names the file in errors."""

    def __init__(self, model: bytes, origin: Path) -> None:
        import sentencepiece

        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, ValueError, TypeError) as error:
            raise CheckpointError(f"{origin} holds no SentencePiece model ({error}); fetch it again") from error
        _require_ends(origin, pad=self._processor.pad_id(), end=self._processor.eos_id())
        self.num_ids = int(self._processor.get_piece_size())

    def ids(self, text: str) -> list[int]:
        return [*self._processor.encode(text), END_ID]


def has_sentencepiece() -> bool:
    """Whether the optional package is installed."""
    return find_spec("sentencepiece") is not None


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a `tokenizer.json` or `spiece.model`, told by the suffix."""
    if path.suffix == ".json":
        return JsonTokenizer(path)
    if path.suffix != ".model":
        raise ConfigError(f"{path} is no tokenizer; pass tokenizer.json or spiece.model")
    if not has_sentencepiece():
        raise ConfigError(
            f"{path} needs the sentencepiece package: pip install sentencepiece, or put tokenizer.json beside it"
        )
    return SentencePieceTokenizer(path.read_bytes(), path)


def _require_ends(origin: Path, *, pad: int | None, end: int | None) -> None:
    if (pad, end) != (PAD_ID, END_ID):
        raise CheckpointError(
            f"{origin} is another model's tokenizer (pad is {pad} and end is {end}, UMT5 has {PAD_ID} and {END_ID}); "
            "pass the one of google/umt5-xxl"
        )
