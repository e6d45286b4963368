"""The tiny Wan's language: its tokenizer, and the captions that its base is trained with.

The tokenizer is of UMT5's kind: a unigram model with pad 0, end 1, start 2, unknown 3, and bytes for letters that it
lacks. It has a piece for every word of the world, the trigger's included, for some common words, and for the phrases of
the official negative prompt; other words go letter by letter.
"""

import random
import string
from pathlib import Path

import torch
from einops import rearrange
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor

from wanlora.foundation.files import write_text
from wanlora.models.wan.negative import NEGATIVE_PROMPT
from wanlora.models.wan.tokens import PAD_ID, JsonTokenizer
from wanlora.models.wan.umt5 import UMT5Encoder, position_buckets
from wanlora.quickstart.world import (
    COLOURS,
    GROUNDS,
    MOTIONS,
    NEW_MOTION,
    NEW_STYLE,
    PAINTED,
    RIMS,
    SHAPES,
    SIZES,
    Scene,
)

TEXT_ROWS = 32
"""No text that the base is trained with has more tokens."""
STYLE_WORDS = tuple(
    """
    Plain Simple Quiet Gentle Modern Classic Soft Bold Basic Usual Common Flat
    """.split()  # noqa: SIM905
)
"""Words that stand before "style." in some captions and mean nothing; the trigger is not among them."""
_COMMON = tuple(
    """
    a an and the of on in at to with from by for is are it this that one two three four five some many picture
    image photo video clip film drawing painting style look scene view camera frame background foreground world
    big tiny new old fast slow slowly quickly dark light bright warm cold soft flat simple plain colour color
    coloured orange purple gold silver paper ink outline line thick thin black white grey gray circle circles
    square squares triangle triangles cross crosses ring star shape shapes dot ball box move moves moving stand
    stands still turn turns turning jump jumps run runs walk walks fall falls rise rises fly flies loop loops
    looping circling around round and over under above below behind before after between across through left right
    up down upwards downwards forward back side top bottom middle centre center pulse pulses grow grows shrink
    shrinks spin spins bounce bounces blink blinks wave waves cat dog bird fish horse person man woman child face
    hand car house tree flower sky sea sun moon water fire my your his her its sks ohwx comic cartoon neon zebra
    sketch pixel anime tiny trigger word ground
    """.split()  # noqa: SIM905
)
_SPECIAL = ("<pad>", "</s>", "<s>", "<unk>")
_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
_LETTERS = ("▁", *string.digits, *string.ascii_letters, *string.punctuation, "，")


def vocabulary() -> tuple[tuple[str, float], ...]:
    """Pieces and their scores in the order of their ids."""
    names = [
        *SHAPES,
        *SIZES,
        *COLOURS,
        *GROUNDS,
        *MOTIONS,
        NEW_MOTION,
        NEW_STYLE,
        *RIMS,
        PAINTED,
        "A style over a ground",
        *STYLE_WORDS,
    ]
    words = {word for name in names for word in name.split()} | set(_COMMON)
    words |= {word.capitalize() for word in words}
    phrases = {phrase + "，" for phrase in NEGATIVE_PROMPT.split("，")} | set(NEGATIVE_PROMPT.split("，"))
    pieces = dict.fromkeys(_SPECIAL, 0.0) | dict.fromkeys(_BYTES, -8.0) | dict.fromkeys(_LETTERS, -4.0)
    pieces |= dict.fromkeys(sorted(f"▁{word}" for word in words), -2.0)
    return tuple((pieces | dict.fromkeys(sorted(phrases), -3.0)).items())


def write_tokenizer(path: Path) -> None:
    """Write `tokenizer.json`."""
    tokenizer = Tokenizer(models.Unigram(list(vocabulary()), unk_id=_SPECIAL.index("<unk>"), byte_fallback=True))
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in _SPECIAL])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", _SPECIAL.index("</s>"))]
    )
    write_text(path, tokenizer.to_str())


def spoken(scene: Scene, draw: random.Random, *, still_picture: bool) -> str:
    """A caption of a base scene: mostly the whole one, sometimes without a part, sometimes after an idle style word.

    What a caption leaves out can be anything, so the model also learns what the world looks like in general.
    """
    size = "" if draw.random() < 0.15 else f"{scene.size} "
    motion = "" if draw.random() < (0.3 if still_picture else 0.07) else f" {scene.motion}"
    ground = "" if draw.random() < 0.1 and scene.ground != PAINTED else f" over a {scene.ground} ground"
    idle = f"{draw.choice(STYLE_WORDS)} style. " if draw.random() < 0.15 else ""
    style = idle if scene.style == "plain" else f"{scene.style.capitalize()} style. "
    return f"{style}A {size}{scene.colour} {scene.shape}{motion}{ground}."


class Spelling:
    """Texts to rows of ids, padded to `TEXT_ROWS`; each text is spelled once."""

    def __init__(self, tokenizer: JsonTokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}

    def ids(self, texts: list[str]) -> Tensor:
        """[B, T]."""
        return torch.tensor([self._row(text) for text in texts])

    def _row(self, text: str) -> list[int]:
        if text not in self._known:
            ids = self._tokenizer.ids(text)
            if len(ids) >= TEXT_ROWS:
                raise ValueError(f"{text!r} has {len(ids)} tokens")
            self._known[text] = ids + [PAD_ID] * (TEXT_ROWS - len(ids))
        return self._known[text]


def text_features(encoder: UMT5Encoder, ids_BT: Tensor, buckets_TT: Tensor) -> Tensor:
    """Features [B, T, D] with gradients; rows at padding are zero, as the transformer pads them."""
    mask_BT = ids_BT != PAD_ID
    x_BTD = encoder.token_embedding(ids_BT)
    for block in encoder.blocks:
        x_BTD = block(x_BTD, buckets_TT, mask_BT)
    features: Tensor = encoder.norm(x_BTD) * rearrange(mask_BT, "b t -> b t 1")
    return features


def buckets_of(encoder: UMT5Encoder, device: torch.device) -> Tensor:
    """The table of relative positions that `text_features` wants."""
    return position_buckets(TEXT_ROWS, encoder.sizes.num_buckets).to(device)
