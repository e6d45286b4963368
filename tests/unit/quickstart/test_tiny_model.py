"""The tiny Wan's files load through the loaders that real files go through, and behave like a trained model's."""

from pathlib import Path

import torch
from einops import rearrange
from tokenizers import Tokenizer

from tests.tiny import SCENES, TinyWan, make_tiny_wan
from wanlora.foundation.tensor_files import open_tensors
from wanlora.models.wan.checkpoint import load_transformer
from wanlora.models.wan.recognise import file_kind
from wanlora.models.wan.spec import WanSizes
from wanlora.models.wan.text import TextEncoder, load_tokenizer
from wanlora.models.wan.umt5 import load_umt5
from wanlora.models.wan.vae import load_vae
from wanlora.quickstart.tiny_model import SIZES
from wanlora.quickstart.tiny_tokenizer import VOCABULARY
from wanlora.quickstart.world import film


def test_each_file_is_recognised_as_what_it_is(tiny_models: TinyWan) -> None:
    flags = []
    for path in (tiny_models.dit, tiny_models.vae, tiny_models.t5):
        with open_tensors(path) as source:
            kind = file_kind(source.names)
        assert kind is not None
        flags.append(kind.flag)
    assert flags == ["--dit", "--vae", "--t5"]


def test_the_transformer_has_the_official_structure(tiny_models: TinyWan) -> None:
    with open_tensors(tiny_models.dit) as source:
        assert WanSizes.from_shapes({name: source.shape(name) for name in source.names}) == SIZES
        assert {source.dtype(name) for name in source.names} == {torch.bfloat16}
        assert all(source.read(name).any() for name in source.names)
    assert SIZES.num_layers > 10 and SIZES.num_heads == 1


def test_the_transformer_loads_and_its_velocity_has_the_size_of_noise(tiny_models: TinyWan) -> None:
    model = load_transformer(tiny_models.dit, "t2v-14B", device="cpu", dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 16, 2, 4, 6, generator=generator), torch.randn(7, SIZES.text_dim, generator=generator)
    velocity = model(x, torch.tensor([900.0, 100.0]), [text, text])
    assert velocity.shape == x.shape
    assert 0.3 < velocity.std() < 3
    assert not torch.allclose(velocity, model(x, torch.tensor([900.0, 100.0]), [-text, text]))


def test_the_text_encoder_loads_and_tells_captions_apart(tiny_models: TinyWan) -> None:
    tokenizer = load_tokenizer(None, tiny_models.t5, offline=True)
    encoder = TextEncoder(load_umt5(tiny_models.t5, device="cpu"), tokenizer)
    first, second = encoder.encode(["A red circle", "A green circle"])
    assert first.shape == second.shape and first.shape[1] == SIZES.text_dim
    assert 0.3 < first.float().std() < 3
    assert not torch.allclose(first, second)


def test_the_files_do_not_depend_on_the_number_of_threads(tiny_models: TinyWan, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        other = make_tiny_wan(tmp_path)
    finally:
        torch.set_num_threads(threads)
    assert other.vae.read_bytes() == tiny_models.vae.read_bytes()


def test_the_same_seed_gives_the_same_files_and_another_seed_others(tiny_models: TinyWan, tmp_path: Path) -> None:
    again, other = make_tiny_wan(tmp_path / "again"), make_tiny_wan(tmp_path / "other", seed=1)
    for name in ("dit", "vae", "t5"):
        assert getattr(again, name).read_bytes() == getattr(tiny_models, name).read_bytes()
        assert getattr(other, name).read_bytes() != getattr(tiny_models, name).read_bytes()


def test_latents_have_the_usual_spread_and_pictures_are_not_flat(tiny_models: TinyWan) -> None:
    vae = load_vae(tiny_models.vae, device="cpu")
    frames = torch.from_numpy(film(SCENES[3], 13, 64, 48))
    latents = vae.encode(rearrange(frames.float() / 127.5 - 1, "f h w c -> 1 c f h w"))
    assert 0.5 < latents.std() < 2.5 and latents.mean().abs() < 1
    pictures = vae.decode(latents)
    assert 0.2 < pictures.std() < 0.8 and pictures.mean().abs() < 0.5


def test_captions_are_tokenised_as_umt5_tokenises(tiny_models: TinyWan) -> None:
    tokenizer = Tokenizer.from_file(str(tiny_models.tokenizer))
    caption = tokenizer.encode("A red cross moves up")
    assert caption.tokens[-1] == "</s>" and caption.ids[-1] == 1
    assert {"▁red", "▁cross", "▁moves", "▁up"} <= set(caption.tokens)
    assert tokenizer.encode("é").tokens == ["▁", "<0xC3>", "<0xA9>", "</s>"]
    assert tokenizer.encode("").ids == [1]
    with open_tensors(tiny_models.t5) as source:
        assert source.shape("token_embedding.weight")[0] == len(VOCABULARY) == tokenizer.get_vocab_size()
