"""A folder in which one thing at a time is spoilt, and what a program must do then.

Everything that a user has lies in it: models, pictures, clips, captions, caches, a dataset TOML, prompts. Programs are
called inside it, so that names in commands and messages are as short as a user's. Spoilt input must be refused with
exit code 2 and one message; nothing that lay in the folder may be touched, nothing may be added.
"""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import SCENES
from wanlora.cli import cache_latents, cache_text_encoder_outputs, train_network
from wanlora.foundation import log as log_module
from wanlora.foundation.files import Fingerprint, fingerprint
from wanlora.foundation.random import Streams
from wanlora.foundation.tensor_files import open_tensors, save_tensors
from wanlora.models.wan.spec import WanSizes
from wanlora.quickstart.media import write_clip, write_picture
from wanlora.quickstart.tiny_model import TEXT_DIM, TinyWan, transformer_weights

Main = Callable[[Sequence[str]], int]
SIZES = WanSizes(dim=128, ffn_dim=256, num_layers=2, text_dim=TEXT_DIM)
STYLE = """\
[general]
caption_extension = ".txt"
enable_bucket = true

[[datasets]]
image_directory = "images"
cache_directory = "cache_images"
resolution = [32, 32]

[[datasets]]
video_directory = "videos"
cache_directory = "cache_videos"
resolution = [48, 32]
target_frames = [1, 5]
"""
LATENTS = ("--dataset_config", "style.toml", "--vae", "vae.safetensors", "--device", "cpu")
TEXTS = ("--dataset_config", "style.toml", "--t5", "t5.pth", "--device", "cpu")
TRAIN = (
    *("--task", "t2v-14B", "--dit", "dit.safetensors", "--dataset_config", "style.toml", "--sdpa", "--device", "cpu"),
    *(
        "--network_module",
        "networks.lora_wan",
        "--network_dim",
        "4",
        "--output_dir",
        "output",
        "--output_name",
        "style",
    ),
    *("--optimizer_type", "adamw", "--max_train_steps", "1", "--max_data_loader_n_workers", "0"),
)
PREVIEWS = ("--vae", "vae.safetensors", "--t5", "t5.pth", "--sample_prompts", "prompts.txt", "--sample_at_first")
PICTURE_CACHE = "cache_images/red_0064x0048_wan.safetensors"
PICTURE_TEXT = "cache_images/red_wan_te.safetensors"
CLIP_CACHE = "cache_videos/green_00000-005_0048x0032_wan.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """Something that is wrong, and what must be said about it."""

    says: tuple[str, ...]
    """Parts of the message: the place and the cure among them."""
    spoil: "Callable[[Bench], object] | None" = None
    flags: tuple[str, ...] = ()
    """Put behind the usual flags, and win over them."""
    without: tuple[str, ...] = ()
    """Usual flags that are left out, each with its value."""
    may_appear: tuple[str, ...] = ()
    """Files that may be added or renewed."""


@dataclass(frozen=True, slots=True)
class Bench:
    """The folder of one test, which is also the current one."""

    folder: Path
    capture: pytest.CaptureFixture[str]

    def write(self, name: str, text: str) -> Path:
        """Write a text file, newlines as they stand."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode("utf-8"))
        return path

    def cut(self, name: str, share: float = 0.5) -> None:
        """Keep only the first `share` of a file."""
        path = self.folder / name
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])

    def change(self, name: str, old: str, new: str) -> None:
        """Replace text in a file, which must be there once."""
        text = (self.folder / name).read_text(encoding="utf-8")
        assert text.count(old) == 1
        self.write(name, text.replace(old, new))

    def change_tensors(self, name: str, change: Callable[[dict[str, Any]], object], to: str | None = None) -> None:
        """Load a safetensors file, let `change` alter its dict of tensors, and save it."""
        metadata = _metadata(self.folder / name)
        tensors = {key: tensor.clone() for key, tensor in load_file(self.folder / name).items()}
        change(tensors)
        save_file(tensors, self.folder / (to or name), metadata=metadata)

    def call(self, main: Main, *flags: str) -> tuple[int, str]:
        """Exit code and everything that was printed."""
        self.capture.readouterr()
        log_module._said.clear()
        code = main(flags)
        printed = self.capture.readouterr()
        return code, (printed.out + printed.err).replace(os.sep, "/")

    def refuses(self, main: Main, flags: Sequence[str], says: Sequence[str], may_appear: Sequence[str] = ()) -> str:
        """Call a program that must refuse its input; returns what was printed."""
        before = snapshot(self.folder, may_appear)
        code, printed = self.call(main, *flags)
        assert code == 2, printed
        assert "Traceback" not in printed
        assert "error: " in printed
        missing = [part for part in says if part not in printed]
        assert not missing, f"{missing} not in:\n{printed}"
        after = snapshot(self.folder, may_appear)
        assert after == before, sorted(name for name, _ in set(before.items()) ^ set(after.items()))
        return printed


def check(bench: Bench, main: Main, usual: Sequence[str], case: Case) -> None:
    """The program refuses the case as it should."""
    if case.spoil:
        case.spoil(bench)
    bench.refuses(main, (*without(usual, case.without), *case.flags), case.says, case.may_appear)


def without(flags: Sequence[str], left_out: Sequence[str]) -> tuple[str, ...]:
    """The flags less some and their values."""
    kept = list(flags)
    for flag in left_out:
        position = kept.index(flag)
        del kept[position : position + 2]
    return tuple(kept)


def parametrised(cases: Mapping[str, Case]) -> pytest.MarkDecorator:
    """A test for each case, under its name."""
    return pytest.mark.parametrize("case", list(cases.values()), ids=list(cases))


def snapshot(folder: Path, ignored: Sequence[str] = ()) -> dict[str, Fingerprint | None]:
    """Size, time and digest of every file in a folder, and None for every folder, by relative name."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    return {name: fingerprint(path) if path.is_file() else None for name, path in found.items() if name not in ignored}


def furnish(folder: Path, models: TinyWan) -> None:
    """Put models, media, captions, TOML and prompts into a folder and cache everything with the real programs."""
    save_tensors(folder / "dit.safetensors", {n: t.bfloat16() for n, t in weights(SIZES).items()})
    shutil.copy(models.vae, folder / "vae.safetensors")
    shutil.copy(models.t5, folder / "t5.pth")
    shutil.copytree(models.tokenizer.parent.parent, folder / "google")
    for scene, name in zip(SCENES, ("red", "yellow"), strict=False):
        write_picture(folder / "images" / f"{name}.png", scene, width=64, height=48)
        (folder / "images" / f"{name}.txt").write_text(scene.caption, encoding="utf-8")
    for scene, name in zip(SCENES[2:], ("green", "white"), strict=False):
        write_clip(folder / "videos" / f"{name}.mp4", scene, frames=9, width=96, height=64)
        (folder / "videos" / f"{name}.txt").write_text(scene.caption, encoding="utf-8")
    (folder / "style.toml").write_text(STYLE, encoding="utf-8")
    (folder / "prompts.txt").write_text("A red circle --w 32 --h 32 --f 1 --s 1\n", encoding="utf-8")
    here = Path.cwd()
    os.chdir(folder)
    try:
        assert cache_latents.main(LATENTS) == 0
        assert cache_text_encoder_outputs.main(TEXTS) == 0
    finally:
        os.chdir(here)


def weights(sizes: WanSizes) -> dict[str, torch.Tensor]:
    """Tensors of a transformer of these sizes, float32."""
    return transformer_weights(Streams(0), sizes)


def lora(sizes: WanSizes = SIZES, rank: int = 4, module: str = "lora_unet_blocks_0_self_attn_q") -> dict[str, Any]:
    """A LoRA of one module in the kohya spelling."""
    return {
        f"{module}.lora_down.weight": torch.ones(rank, sizes.dim),
        f"{module}.lora_up.weight": torch.ones(sizes.dim, rank),
        f"{module}.alpha": torch.tensor(float(rank)),
    }


def _metadata(path: Path) -> dict[str, str]:
    with open_tensors(path) as source:
        return source.metadata


TRAINING: Main = train_network.main
CACHING: Main = cache_latents.main
CACHING_TEXT: Main = cache_text_encoder_outputs.main
