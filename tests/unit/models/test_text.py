"""Prompts to features: cleaning, where the tokenizer comes from, batches, the limit of 512 tokens."""

import io
import json
import logging
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from wanlora.foundation.errors import CheckpointError, ConfigError
from wanlora.foundation.tensor_files import save_tensors
from wanlora.models.wan import text, tokens
from wanlora.models.wan.negative import NEGATIVE_PROMPT
from wanlora.models.wan.text import TextEncoder, clean, load_tokenizer
from wanlora.models.wan.tokens import JsonTokenizer, SentencePieceTokenizer, read_tokenizer
from wanlora.models.wan.umt5 import UMT5Encoder, UMT5Sizes

SENTENCES = [
    "Studio style. Woman with blonde hair is walking on the beach, camera zoom out.",
    "A red ball bounces on the grass while a dog runs after it.",
    "The camera pans slowly over a quiet lake at dawn.",
    "色调艳丽，过曝，静态，细节模糊不清",
]
PROBES = [*SENTENCES, "", "x", "unseen wörds and emoji 🎈", "a  b   c", "静态 camera, 100%"]


@pytest.fixture(scope="module")
def spiece() -> bytes:
    """A SentencePiece model of UMT5's kind, trained on a few sentences."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 5), model_writer=model, model_type="unigram", vocab_size=420,
        hard_vocab_limit=False, byte_fallback=True, pad_id=0, eos_id=1, bos_id=2, unk_id=3,
        normalization_rule_name="identity", minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


@pytest.fixture(scope="module")
def folder(spiece: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both files of one tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "spiece.model").write_bytes(spiece)
    processor = sentencepiece.SentencePieceProcessor(model_proto=spiece)
    pieces = [(processor.id_to_piece(id), processor.get_score(id)) for id in range(processor.get_piece_size())]
    tokenizer = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=3, byte_fallback=True))
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False) for piece in ("<pad>", "</s>", "<s>", "<unk>")])
    tokenizer.normalizer = normalizers.Replace(Regex(" {2,}"), " ")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.enable_padding(length=512)
    tokenizer.enable_truncation(512)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> JsonTokenizer:
    return JsonTokenizer(folder / "tokenizer.json")


def small_encoder(vocab: int) -> UMT5Encoder:
    torch.manual_seed(0)
    sizes = UMT5Sizes(vocab=vocab, dim=16, attention_dim=12, ffn_dim=24, num_heads=2, num_layers=2)
    model = UMT5Encoder(sizes)
    for parameter in model.parameters():
        parameter.copy_(0.3 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def encoder(tokenizer: JsonTokenizer) -> TextEncoder:
    return TextEncoder(small_encoder(tokenizer.num_ids), tokenizer, "cpu")


@pytest.fixture
def t5(tmp_path: Path) -> Path:
    """A weights file without a tokenizer inside."""
    save_tensors(tmp_path / "t5.safetensors", {"norm.weight": torch.zeros(1)})
    return tmp_path / "t5.safetensors"


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("wanlora"), "propagate", True)
    caplog.set_level(logging.INFO, logger="wanlora")
    return caplog


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("  a\t b\n\nc ", "a b c"),
        ("&amp;lt;b&amp;gt;", "<b>"),
        ("过曝，静态", "过曝,静态"),
        ("“quoted” ’tis", '"quoted" \'tis'),
        ("schÃ¶n", "schön"),
        (" \n ", ""),
    ],
)
def test_prompts_are_cleaned_as_in_the_official_code(raw: str, cleaned: str) -> None:
    assert clean(raw) == cleaned


def test_the_negative_prompt_is_the_published_one() -> None:
    golden = Path(__file__).parents[2] / "golden" / "negative-prompts.json"
    assert json.loads(golden.read_text(encoding="utf-8"))["wan2.1 t2v, wan2.2"] == NEGATIVE_PROMPT


@pytest.mark.parametrize("probe", PROBES)
def test_both_files_give_the_same_ids(folder: Path, spiece: bytes, probe: str) -> None:
    ids = read_tokenizer(folder / "tokenizer.json").ids(probe)
    assert ids == read_tokenizer(folder / "spiece.model").ids(probe)
    assert ids == [*sentencepiece.SentencePieceProcessor(model_proto=spiece).encode(probe), 1]


def test_a_file_s_own_padding_and_cut_are_not_used(tokenizer: JsonTokenizer) -> None:
    assert tokenizer.ids("") == [1]
    assert len(tokenizer.ids("ball " * 600)) > 600


@pytest.mark.parametrize("name", ["tokenizer.json", "spiece.model", ""])
def test_the_path_given_comes_first(folder: Path, t5: Path, name: str, said: pytest.LogCaptureFixture) -> None:
    copy = t5.parent / "google" / "umt5-xxl" / "tokenizer.json"
    copy.parent.mkdir(parents=True)
    copy.write_text("not read", encoding="utf-8")
    assert load_tokenizer(folder / name, t5, offline=True).ids("ball")[-1] == 1
    assert said.messages == [f"tokenizer: {folder / (name or 'tokenizer.json')}"]


@pytest.mark.parametrize("name", ["tokenizer.json", "spiece.model"])
def test_the_folder_beside_the_weights_comes_second(
    folder: Path, t5: Path, name: str, said: pytest.LogCaptureFixture
) -> None:
    copy = t5.parent / "google" / "umt5-xxl" / name
    copy.parent.mkdir(parents=True)
    copy.write_bytes((folder / name).read_bytes())
    assert load_tokenizer(None, t5, offline=True).num_ids == load_tokenizer(folder, t5, offline=True).num_ids
    assert said.messages[0] == f"tokenizer: {copy}"


def with_tokenizer_inside(folder: Path, spiece: bytes) -> Path:
    path = folder / "umt5_xxl_fp8_e4m3fn_scaled.safetensors"
    save_tensors(path, {"spiece_model": torch.frombuffer(bytearray(spiece), dtype=torch.uint8)})
    return path


def test_the_tokenizer_inside_the_weights_comes_third(
    tmp_path: Path, spiece: bytes, tokenizer: JsonTokenizer, said: pytest.LogCaptureFixture
) -> None:
    path = with_tokenizer_inside(tmp_path, spiece)
    loaded = load_tokenizer(None, path, offline=True)
    assert [loaded.ids(probe) for probe in PROBES] == [tokenizer.ids(probe) for probe in PROBES]
    assert said.messages == [f"tokenizer: inside {path}"]


def test_the_hub_comes_last(
    folder: Path, tmp_path: Path, spiece: bytes, monkeypatch: pytest.MonkeyPatch, said: pytest.LogCaptureFixture
) -> None:
    asked: list[tuple[str, str, bool]] = []

    def download(repository: str, name: str, local_files_only: bool) -> str:
        asked.append((repository, name, local_files_only))
        return str(folder / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr(text, "has_sentencepiece", lambda: False)
    load_tokenizer(None, with_tokenizer_inside(tmp_path, spiece), offline=False)
    assert asked == [("google/umt5-xxl", "tokenizer.json", False)]
    assert "sentencepiece, which reads it, is not installed" in said.messages[0]
    assert said.messages[1] == f"tokenizer: {folder / 'tokenizer.json'}"


@pytest.mark.parametrize(("offline", "why"), [(True, "--offline forbids"), (False, "could not give it (no route)")])
def test_without_a_tokenizer_the_error_says_what_to_fetch_and_where_to_put_it(
    t5: Path, offline: bool, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(repository: str, name: str, local_files_only: bool) -> str:
        assert local_files_only == offline
        raise LocalEntryNotFoundError("no route\nand more")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(None, t5, offline)
    message = str(caught.value)
    assert why in message
    assert "https://huggingface.co/google/umt5-xxl/resolve/main/tokenizer.json" in message
    assert str(t5.parent / "google" / "umt5-xxl" / "tokenizer.json") in message
    assert "--tokenizer PATH" in message


def test_a_tokenizer_path_that_leads_nowhere_is_refused(t5: Path) -> None:
    with pytest.raises(ConfigError, match="missing does not exist"):
        load_tokenizer(t5.parent / "missing", t5, offline=True)
    with pytest.raises(ConfigError, match=r"holds neither tokenizer.json nor spiece.model"):
        load_tokenizer(t5.parent, t5, offline=True)
    with pytest.raises(ConfigError, match="is no tokenizer"):
        load_tokenizer(t5, t5, offline=True)


def test_a_spiece_model_without_the_package_names_the_package(
    folder: Path, t5: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "has_sentencepiece", lambda: False)
    with pytest.raises(ConfigError, match="pip install sentencepiece"):
        load_tokenizer(folder / "spiece.model", t5, offline=True)


def test_broken_and_foreign_tokenizers_are_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"is no tokenizer.json"):
        JsonTokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(CheckpointError, match="holds no SentencePiece model"):
        SentencePieceTokenizer(b"nonsense", tmp_path)
    foreign = tokenizers.Tokenizer(models.Unigram([("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0)], unk_id=0))
    foreign.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="another model's tokenizer"):
        JsonTokenizer(tmp_path / "tokenizer.json")


def test_a_tokenizer_with_more_ids_than_the_encoder_is_refused(tokenizer: JsonTokenizer) -> None:
    with pytest.raises(CheckpointError, match=f"{tokenizer.num_ids} ids, but the text encoder knows 100"):
        TextEncoder(small_encoder(100), tokenizer)


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_texts_come_back_in_their_order_at_their_length(
    encoder: TextEncoder, tokenizer: JsonTokenizer, batch_size: int
) -> None:
    features = encoder.encode(PROBES, batch_size)
    alone: list[Tensor] = [encoder.encode([probe])[0] for probe in PROBES]
    assert [len(rows) for rows in features] == [len(tokenizer.ids(clean(probe))) for probe in PROBES]
    for rows, expected in zip(features, alone, strict=True):
        torch.testing.assert_close(rows, expected, atol=1e-5, rtol=1e-5)


def test_features_are_on_the_cpu_in_the_model_s_format(tokenizer: JsonTokenizer) -> None:
    features = TextEncoder(small_encoder(tokenizer.num_ids).bfloat16(), tokenizer).encode(["a red ball"])[0]
    assert features.dtype == torch.bfloat16
    assert features.device.type == "cpu"
    assert features.untyped_storage().nbytes() == features.numel() * 2


def test_batches_hold_texts_of_like_length(encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    plain = encoder._encode

    def spy(ids: list[Tensor]) -> list[Tensor]:
        lengths.extend(len(one) for one in ids)
        return plain(ids)

    monkeypatch.setattr(encoder, "_encode", spy)
    encoder.encode(["ball " * 9, "a", "ball " * 8, ""], batch_size=2)
    assert lengths == sorted(lengths, reverse=True)
    assert len(lengths) == 4


def test_no_texts_give_no_features(encoder: TextEncoder) -> None:
    assert encoder.encode([]) == []


def test_a_long_text_is_cut_at_512_tokens_with_its_end_kept_and_is_named(
    encoder: TextEncoder, tokenizer: JsonTokenizer, said: pytest.LogCaptureFixture
) -> None:
    long = "Studio style. " + "ball " * 600
    ids = tokenizer.ids(clean(long))
    assert encoder.tokens(long).tolist() == [*ids[:511], 1]
    assert f"has {len(ids)} tokens" in said.text
    assert '"Studio style. ball' in said.text


class OneIdPerWord:
    """A tokenizer whose counts are easy to see."""

    num_ids = 50

    def ids(self, text: str) -> list[int]:
        return [*range(2, 2 + len(text.split())), 1]


def test_a_text_of_exactly_512_tokens_is_not_cut(said: pytest.LogCaptureFixture) -> None:
    encoder = TextEncoder(small_encoder(50), OneIdPerWord())
    assert encoder.tokens("word " * 511).tolist() == [*range(2, 513), 1]
    assert not said.messages
    assert encoder.tokens("word " * 512).tolist() == [*range(2, 513), 1]
    assert "has 513 tokens" in said.text
