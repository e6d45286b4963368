"""Model files, LoRA files, pictures and clips that are not what they should be."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import av
import huggingface_hub.constants
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.integration.bench import (
    CACHING,
    CACHING_TEXT,
    LATENTS,
    PREVIEWS,
    SIZES,
    TEXTS,
    TRAIN,
    TRAINING,
    Bench,
    Case,
    check,
    lora,
    parametrised,
)
from tests.tiny import SCENES
from wanlora.models.wan.spec import TASKS, WanSizes
from wanlora.models.wan.transformer import WanTransformer
from wanlora.quickstart.media import write_picture

Spoil = Callable[[Bench], object]
Tensors = dict[str, Any]


class Code:
    """Something in a pickle that would run a program."""

    def __reduce__(self) -> tuple[Any, ...]:
        return subprocess.call, (["touch", "ran"],)


def cut(name: str) -> Spoil:
    """Half a file."""
    return lambda bench: bench.cut(name)


def copy(name: str, to: str) -> Spoil:
    """The same file under another name."""
    return lambda bench: shutil.copy(bench.folder / name, bench.folder / to)


def save(name: str, tensors: Mapping[str, Any]) -> Spoil:
    """Write a safetensors file."""
    return lambda bench: save_file(dict(tensors), bench.folder / name)


def change(name: str, alter: Callable[[Tensors], object]) -> Spoil:
    """Alter the tensors of a safetensors file."""
    return lambda bench: bench.change_tensors(name, alter)


def both(*spoils: Spoil) -> Spoil:
    """One after the other."""
    return lambda bench: [spoil(bench) for spoil in spoils]


def as_pickle(bench: Bench) -> None:
    torch.save({"patch_embedding.weight": torch.zeros(1), "code": Code()}, bench.folder / "dit.pth")


def with_image_branch(tensors: Tensors) -> None:
    """What tells an image-to-video model: more input channels and the projection of image features."""
    tensors["patch_embedding.weight"] = torch.zeros(SIZES.dim, 36, 1, 2, 2)
    tensors["img_emb.proj.0.weight"] = torch.zeros(1280)


def released(bench: Bench) -> None:
    """A file of the size of Wan2.1-T2V-1.3B, with nothing in it but its header."""
    write_hollow(bench.folder / "small.safetensors", TASKS["t2v-1.3B"].sizes)


def write_hollow(path: Path, sizes: WanSizes) -> None:
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in WanTransformer(sizes).state_dict().items()}
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)


def other_tokenizer(bench: Bench) -> None:
    bench.write(
        "tokenizer.json", (bench.folder / "google/umt5-xxl/tokenizer.json").read_text().replace("<pad>", "<pud>")
    )


def sound_only(bench: Bench) -> None:
    with av.open(str(bench.folder / "videos" / "green.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


WIDE = WanSizes(dim=256, ffn_dim=256, num_layers=2, text_dim=SIZES.text_dim)
LOHA = {f"lora_unet_blocks_0_self_attn_q.hada_w{n}_{part}": torch.zeros(4, 4) for n in "12" for part in "ab"}
MODELS = {
    "missing": Case(flags=("--dit", "dti.safetensors"), says=("--dit: there is no dti.safetensors", "did you mean")),
    "in a missing folder": Case(flags=("--dit", "models/dit.safetensors"), says=("its folder models does not exist",)),
    "cut off": Case(spoil=cut("dit.safetensors"), says=("dit.safetensors is cut off", "fetch or make it again")),
    "empty": Case(
        spoil=lambda b: (b.folder / "dit.safetensors").write_bytes(b""), says=("dit.safetensors is cut off",)
    ),
    "a web page": Case(
        spoil=lambda bench: bench.write("dit.safetensors", "<html>Sign in to download</html>"),
        says=("dit.safetensors is cut off or is no safetensors file", "fetch or make it again"),
    ),
    "the VAE": Case(
        flags=("--dit", "vae.safetensors"), says=("vae.safetensors is the Wan 2.1 VAE", "it belongs to --vae")
    ),
    "the text encoder": Case(flags=("--dit", "t5.pth"), says=("t5.pth is the UMT5 text encoder", "belongs to --t5")),
    "a LoRA": Case(
        spoil=save("lora.safetensors", lora()),
        flags=("--dit", "lora.safetensors"),
        says=("lora.safetensors is a LoRA", "--network_weights or --base_weights"),
    ),
    "something else": Case(
        spoil=save("x.safetensors", {"a.weight": torch.zeros(1)}),
        flags=("--dit", "x.safetensors"),
        says=("x.safetensors is of no kind known here (its first tensors: a.weight)",),
    ),
    "image to video": Case(
        spoil=change("dit.safetensors", with_image_branch),
        says=("dit.safetensors is a Wan2.1 image to video transformer", "--task t2v-14B trains Wan2.1-T2V-14B"),
    ),
    "the other size": Case(
        spoil=released,
        flags=("--dit", "small.safetensors"),
        says=("small.safetensors is Wan2.1-T2V-1.3B, but --task t2v-14B", "use --task t2v-1.3B"),
    ),
    "lacking a tensor": Case(
        spoil=change("dit.safetensors", lambda tensors: tensors.pop("blocks.1.ffn.2.weight")),
        says=("dit.safetensors should be", "lacks 1 tensors (blocks.1.ffn.2.weight)", "fetch the file again"),
    ),
    "of 8-bit integers": Case(
        spoil=change("dit.safetensors", lambda t: t.update({"blocks.0.ffn.0.weight": torch.zeros(256, 128).char()})),
        says=("blocks.0.ffn.0.weight is stored as int8", "use the bf16, fp16, fp8 or fp8_scaled version"),
    ),
    "a pickle with code in it": Case(
        spoil=as_pickle,
        flags=("--dit", "dit.pth"),
        says=("dit.pth holds more than tensors", "use the .safetensors version"),
    ),
    "without its second shard": Case(
        spoil=copy("dit.safetensors", "dit-00001-of-00002.safetensors"),
        flags=("--dit", "dit-00001-of-00002.safetensors"),
        says=("1 of 2 shards are missing (dit-00002-of-00002.safetensors)", "fetch them"),
    ),
    "GGUF": Case(
        spoil=lambda bench: bench.write("dit.gguf", "GGUF"),
        flags=("--dit", "dit.gguf"),
        says=("dit.gguf", "weights are read from .safetensors and .pth files, not from .gguf files"),
    ),
    "a folder of several": Case(flags=("--dit", "."), says=("is a folder; name the weights file in it", "vae.safet")),
}
PREVIEW_MODELS = {
    "VAE is the transformer": Case(
        flags=("--vae", "dit.safetensors"),
        says=(
            "--vae dit.safetensors is a Wan transformer (it belongs to --dit)",
            "pass the file that belongs to --vae",
        ),
    ),
    "text encoder is the VAE": Case(
        flags=("--t5", "vae.safetensors"), says=("--t5 vae.safetensors is the Wan 2.1 VAE (it belongs to --vae)",)
    ),
    "text encoder is cut off": Case(spoil=cut("t5.pth"), says=("t5.pth is cut off or is no PyTorch weights file",)),
    "missing tokenizer": Case(
        flags=("--tokenizer", "tokenizer.json"), says=("--tokenizer: there is no tokenizer.json",)
    ),
    "tokenizer folder without one": Case(
        flags=("--tokenizer", "images"), says=("--tokenizer: images holds neither tokenizer.json nor", "fetch https://")
    ),
    "tokenizer of another model": Case(
        spoil=other_tokenizer,
        flags=("--tokenizer", "tokenizer.json"),
        says=("tokenizer.json is another model's tokenizer", "pass the one of google/umt5-xxl"),
    ),
    "tokenizer nowhere, offline": Case(
        spoil=lambda bench: shutil.rmtree(bench.folder / "google"),
        flags=("--offline",),
        says=("the tokenizer of the text encoder is not on this machine", "--offline forbids", "pass --tokenizer PATH"),
    ),
}
LORAS = {
    "missing": Case(
        flags=("--network_weights", "x.safetensors"), says=("--network_weights: there is no x.safetensors",)
    ),
    "of another rank": Case(
        spoil=save("lora.safetensors", lora(rank=8)),
        flags=("--network_weights", "lora.safetensors"),
        says=("--network_weights lora.safetensors has rank 8", "--network_dim 8 or --dim_from_weights"),
    ),
    "of a wider model": Case(
        spoil=save("lora.safetensors", lora(WIDE)),
        flags=("--network_weights", "lora.safetensors"),
        says=(
            "--network_weights lora.safetensors was made for another model",
            "maps 256 to 256, this model's 128 to 128",
        ),
    ),
    "of a wider model, rank from it": Case(
        spoil=save("lora.safetensors", lora(WIDE)),
        flags=("--network_weights", "lora.safetensors", "--dim_from_weights"),
        says=("lora.safetensors was made for another model",),
    ),
    "of a deeper model": Case(
        spoil=save("lora.safetensors", lora(module="lora_unet_blocks_39_self_attn_q")),
        flags=("--network_weights", "lora.safetensors"),
        says=("lora.safetensors: 1 of its modules are not in this model", "the file belongs to another model"),
    ),
    "with keys of something else": Case(
        spoil=save("lora.safetensors", {**lora(), "optimizer.step": torch.zeros(1)}),
        flags=("--network_weights", "lora.safetensors"),
        says=("lora.safetensors: 1 of 4 keys are not those of a LoRA (optimizer.step)",),
    ),
    "half a LoRA": Case(
        spoil=save("lora.safetensors", {k: v for k, v in lora().items() if "lora_up" not in k}),
        flags=("--network_weights", "lora.safetensors"),
        says=("lora.safetensors is not whole", "save it again"),
    ),
    "LoHa": Case(
        spoil=save("lora.safetensors", LOHA),
        flags=("--network_weights", "lora.safetensors"),
        says=("lora.safetensors is a LoHa file", "only plain LoRA files"),
    ),
    "a model": Case(flags=("--network_weights", "dit.safetensors"), says=("dit.safetensors: ", "not those of a LoRA")),
    "of modules that are left out": Case(
        spoil=save("lora.safetensors", lora()),
        flags=("--network_weights", "lora.safetensors", "--network_args", "include_patterns=['.*ffn']"),
        says=("1 modules that this run does not train", "change include_patterns"),
    ),
    "merged, of a wider model": Case(
        spoil=save("lora.safetensors", lora(WIDE)),
        flags=("--base_weights", "lora.safetensors"),
        says=("lora.safetensors was made for another model", "[256, 256]", "or remove it from --base_weights"),
    ),
    "merged, of a deeper model": Case(
        spoil=save("lora.safetensors", lora(module="lora_unet_blocks_39_self_attn_q")),
        flags=("--base_weights", "lora.safetensors"),
        says=("lora.safetensors: 1 of its modules are not in this model",),
    ),
    "merged, cut off": Case(
        spoil=both(save("lora.safetensors", lora()), cut("lora.safetensors")),
        flags=("--base_weights", "lora.safetensors"),
        says=("lora.safetensors is cut off",),
    ),
}
INDEXES = ("cache_images/wanlora_index.json", "cache_videos/wanlora_index.json")
MEDIA = {
    "clip cut off": Case(spoil=cut("videos/green.mp4"), says=("videos/green.mp4 is damaged", "take it out of the")),
    "text called a clip": Case(
        spoil=lambda bench: bench.write("videos/green.mp4", "This is no film.\n" * 99),
        says=("videos/green.mp4 is damaged, was not completely written or is no video", "replace it"),
    ),
    "empty clip": Case(
        spoil=lambda bench: (bench.folder / "videos" / "green.mp4").write_bytes(b""),
        says=("videos/green.mp4", "take it out of the dataset"),
    ),
    "clip with sound only": Case(
        spoil=sound_only, says=("videos/green.mp4 holds no video, only sound", "take it out of the dataset")
    ),
    "text called a picture": Case(
        spoil=lambda bench: bench.write("images/red.png", "This is no picture.\n"),
        says=("images/red.png is cut off or is no picture", "take it out of the dataset"),
    ),
    "picture cut off": Case(
        spoil=cut("images/red.png"),
        says=("images/red.png is cut off or is no picture", "take it out of the dataset"),
        may_appear=INDEXES,
    ),
    "two at once": Case(
        spoil=both(cut("videos/green.mp4"), cut("videos/white.mp4")),
        says=("2 problems", "videos/green.mp4", "videos/white.mp4"),
    ),
    "cut off VAE": Case(
        spoil=cut("vae.safetensors"), flags=("--vae_dtype", "bf16"), says=("vae.safetensors is cut off",)
    ),
    "VAE is the text encoder": Case(
        flags=("--vae", "t5.pth"), says=("--vae t5.pth is the UMT5 text encoder", "pass the file that belongs to --vae")
    ),
}
TEXT_MODELS = {
    "text encoder is the transformer": Case(
        flags=("--t5", "dit.safetensors"),
        says=("--t5 dit.safetensors is a Wan transformer", "pass the file that belongs to --t5"),
    ),
    "text encoder cut off": Case(spoil=cut("t5.pth"), says=("t5.pth is cut off", "fetch it again")),
    "tokenizer of another model": Case(
        spoil=both(other_tokenizer, lambda bench: bench.write("images/red.txt", "another caption")),
        flags=("--tokenizer", "tokenizer.json"),
        says=("tokenizer.json is another model's tokenizer",),
    ),
}


@pytest.fixture(autouse=True)
def _nothing_in_the_hub_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@parametrised(MODELS)
def test_transformers(bench: Bench, case: Case) -> None:
    check(bench, TRAINING, TRAIN, case)


@parametrised(PREVIEW_MODELS)
def test_models_for_previews(bench: Bench, case: Case) -> None:
    check(bench, TRAINING, (*TRAIN, *PREVIEWS), case)


@parametrised(LORAS)
def test_loras(bench: Bench, case: Case) -> None:
    check(bench, TRAINING, TRAIN, case)


@parametrised(MEDIA)
def test_pictures_clips_and_vaes(bench: Bench, case: Case) -> None:
    check(bench, CACHING, LATENTS, case)


@parametrised(TEXT_MODELS)
def test_text_encoders(bench: Bench, case: Case) -> None:
    check(bench, CACHING_TEXT, TEXTS, case)


def test_one_broken_picture_does_not_keep_the_others_from_being_cached(bench: Bench) -> None:
    write_picture(bench.folder / "images" / "blue.jpg", SCENES[0], width=64, height=48)
    bench.write("images/blue.txt", "a picture of which half is missing")
    bench.cut("images/blue.jpg", 0.9)
    for cache in bench.folder.glob("cache_images/*_wan.safetensors"):
        cache.unlink()
    code, printed = bench.call(CACHING, *LATENTS)
    assert code == 2
    assert "images/blue.jpg is cut off or is no picture" in printed
    cached = [path.name for path in sorted(bench.folder.glob("cache_images/*_wan.safetensors"))]
    assert cached == ["red_0064x0048_wan.safetensors", "yellow_0064x0048_wan.safetensors"]
