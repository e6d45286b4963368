"""A folder in which the real trainer runs in seconds: a tiny Wan, pictures and clips with random caches.

Encoding is tested elsewhere; here the caches hold noise, written by the same functions that caching uses.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.tiny import SCENES, TinyWan
from wanlora.cli.train_network import main
from wanlora.config.dataset import read_datasets
from wanlora.data.cache_tensors import write_latents, write_text
from wanlora.data.plan import plan_datasets
from wanlora.foundation.files import fingerprint
from wanlora.foundation.files import write_text as write_plain_text
from wanlora.foundation.tensor_files import open_tensors, save_tensors
from wanlora.quickstart.media import write_clip, write_picture
from wanlora.quickstart.tiny_model import TEXT_DIM

_TOML = """\
[general]
caption_extension = ".txt"

[[datasets]]
image_directory = "{folder}/images"
cache_directory = "{folder}/images/cache"
resolution = [48, 32]
batch_size = 2

[[datasets]]
video_directory = "{folder}/videos"
cache_directory = "{folder}/videos/cache"
resolution = [32, 32]
target_frames = [1, 5]
"""


_VALIDATION = """
[[validation]]
image_directory = "{folder}/unseen"
cache_directory = "{folder}/unseen/cache"
resolution = [48, 32]

[[validation]]
video_directory = "{folder}/videos"
cache_directory = "{folder}/videos/validation"
resolution = [32, 48]
target_frames = [5]
batch_size = 2
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingFolder:
    """Where one test trains."""

    folder: Path
    models: TinyWan
    capture: pytest.CaptureFixture[str]

    @property
    def toml(self) -> Path:
        """The dataset file."""
        return self.folder / "dataset.toml"

    @property
    def output(self) -> Path:
        """Where runs write."""
        return self.folder / "output"

    def arguments(self, name: str, *extra: str) -> list[str]:
        """The flags of a short float32 run called `name`; `extra` comes last and wins."""
        return [
            *("--task", "t2v-14B", "--dit", str(self.models.dit), "--dataset_config", str(self.toml)),
            *("--output_dir", str(self.output), "--output_name", name, "--network_module", "networks.lora_wan"),
            *("--network_dim", "4", "--learning_rate", "1e-2", "--optimizer_type", "adamw", "--seed", "7"),
            *("--timestep_sampling", "shift", "--discrete_flow_shift", "3.0", "--sdpa"),
            *("--max_data_loader_n_workers", "0", "--device", "cpu", *extra),
        ]

    def add_validation(self) -> None:
        """Validate on a picture that is not trained and on the three clips at another size, 4 samples in 3 batches."""
        scene = SCENES[3]
        write_picture(self.folder / "unseen" / "unseen.png", scene, width=96, height=64)
        write_plain_text(self.folder / "unseen" / "unseen.txt", scene.caption)
        write_plain_text(self.toml, self.toml.read_text() + _VALIDATION.format(folder=self.folder.as_posix()))
        fill_caches(self.toml)

    def train(self, arguments: list[str]) -> str:
        """Train in this process; the log of a run that must end well."""
        self.capture.readouterr()
        code = main(arguments)
        text = self.capture.readouterr().err
        assert code == 0, text
        return text


def make_training_data(folder: Path) -> None:
    """Three pictures and three clips with captions, a TOML, and random caches."""
    for number, scene in enumerate(SCENES[:3], 1):
        name = f"scene_{number:02d}"
        write_picture(folder / "images" / f"{name}.png", scene, width=96, height=64)
        write_clip(folder / "videos" / f"{name}.mp4", scene, frames=7, width=64, height=64)
        for kind in ("images", "videos"):
            write_plain_text(folder / kind / f"{name}.txt", scene.caption)
    write_plain_text(folder / "dataset.toml", _TOML.format(folder=folder.as_posix()))
    fill_caches(folder / "dataset.toml")


def widen(path: Path, target: Path) -> Path:
    """A float32 copy of a checkpoint, so that maths without mixed precision are float32."""
    with open_tensors(path) as source:
        save_tensors(target, {name: source.read(name).float() for name in source.names})
    return target


def fill_caches(toml: Path) -> None:
    """Write a random cache file for everything that a dataset file asks for."""
    generator = torch.Generator().manual_seed(0)
    for item in plan_datasets(read_datasets(toml)).cached_items:
        stamp = item.stamp(vae="random", vae_dtype="float32")
        shape = (16, stamp.latents.frames, stamp.latents.height, stamp.latents.width)
        latents = torch.randn(shape, generator=generator).to(torch.bfloat16)
        write_latents(item.latent_path, latents, stamp, fingerprint(item.source.path))
        text = torch.randn((7, TEXT_DIM), generator=generator).to(torch.bfloat16)
        assert item.source.caption is not None
        write_text(item.text_path, text, caption=item.source.caption, t5="random")
