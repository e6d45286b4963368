"""A tokenizer of the same kind as UMT5's, for the words of the small world's captions; other words go letter by letter.

Unigram pieces with the same special ids (pad 0, end 1, start 2, unknown 3) and bytes for letters it does not know.
"""

import string
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from wanlora.foundation.files import write_text
from wanlora.quickstart.world import Scene, base_scenes, new_scenes

_SPECIAL = ("<pad>", "</s>", "<s>", "<unk>")
_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
_LETTERS = ("▁", *string.digits, *string.ascii_letters, *string.punctuation)
_SCENES: tuple[Scene, ...] = (*base_scenes(200, seed=0), *new_scenes(200, seed=0))  # with every word of the world
_WORDS = tuple(sorted({f"▁{word.strip('.')}" for scene in _SCENES for word in scene.caption.split()} - {"▁a", "▁A"}))
VOCABULARY = (*_SPECIAL, *_BYTES, *_LETTERS, *_WORDS)
"""Pieces in the order of their ids."""


def write_tokenizer(path: Path) -> None:
    """Write `tokenizer.json`."""
    scores = dict.fromkeys(_WORDS, -2.0) | dict.fromkeys(_LETTERS, -4.0)
    pieces = [(piece, scores.get(piece, 0.0 if piece in _SPECIAL else -8.0)) for piece in VOCABULARY]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=_SPECIAL.index("<unk>"), byte_fallback=True))
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in _SPECIAL])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", _SPECIAL.index("</s>"))]
    )
    write_text(path, tokenizer.to_str())
