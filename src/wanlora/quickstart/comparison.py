"""The same prompts and seeds drawn by the base model, with the LoRA, and with the LoRA off again.

Model, text encoder, autoencoder and LoRA files are read by the loaders that every program uses. With the adapters
still in place but off, the model must give the base's pictures bit for bit: whoever switches a LoRA off gets the model
back that was there before.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from wanlora.config.dataset import read_datasets
from wanlora.config.prompts import read_prompts
from wanlora.data.media import read_items
from wanlora.data.plan import plan_datasets
from wanlora.foundation.shapes import PixelShape
from wanlora.generation.pipeline import Frames, decode_frames, sample_latents
from wanlora.generation.requests import PreviewRequest, resolve_all
from wanlora.lora.files import read_lora
from wanlora.lora.network import LoRANetwork, eject, inject
from wanlora.lora.targets import candidates
from wanlora.models.wan.checkpoint import load_transformer
from wanlora.models.wan.spec import TASKS
from wanlora.models.wan.text import TextEncoder, load_tokenizer
from wanlora.models.wan.transformer import WanTransformer
from wanlora.models.wan.umt5 import load_umt5
from wanlora.models.wan.vae import load_vae
from wanlora.quickstart.tiny_model import TinyWan

TASK = "t2v-14B"


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """What was drawn, clip by clip in the order of the prompts."""

    requests: Sequence[PreviewRequest]
    base: Sequence[Frames]
    lora: Mapping[str, Sequence[Frames]]
    """By the name of the moment in training, the last one at the end."""
    off: Sequence[Frames]
    """Drawn last, with the adapters in place and switched off."""
    dataset: Sequence[Frames]
    """What was trained on, of the same sizes."""

    @property
    def trained(self) -> Sequence[Frames]:
        """Drawn with the finished LoRA."""
        return list(self.lora.values())[-1]

    @property
    def off_equals_base(self) -> bool:
        """Whether no pixel of any clip differs."""
        return all(np.array_equal(off, base) for off, base in zip(self.off, self.base, strict=True))


class Artist:
    """Draws the prompts with a model that adapters can be put on."""

    def __init__(self, models: TinyWan, requests: Sequence[PreviewRequest], device: torch.device) -> None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.model: WanTransformer = load_transformer(models.dit, TASK, device=device, dtype=dtype, progress=False)
        self.vae = load_vae(models.vae, device=device)
        encoder = TextEncoder(load_umt5(models.t5, device="cpu"), load_tokenizer(None, models.t5, offline=True))
        prompts = sorted({text for request in requests for text in request.texts})
        self.texts = dict(zip(prompts, encoder.encode(prompts), strict=True))
        self.requests = requests
        self.device = device

    def adapt(self, path: Path) -> LoRANetwork:
        """Put the LoRA of a file on the model."""
        weights = read_lora(path, candidates(self.model))
        network = inject(
            self.model,
            tuple(weights),
            rank={name: one.rank for name, one in weights.items()},
            alpha={name: one.alpha for name, one in weights.items()},
            generator=torch.Generator(),
        )
        network.load(weights, path.name)
        return network

    def draw(self, title: str) -> list[Frames]:
        """Every prompt, with the model as it is now."""
        return [self._draw(request) for request in tqdm(self.requests, desc=title, unit="clip")]

    def _draw(self, request: PreviewRequest) -> Frames:
        negative = None if request.negative_prompt is None else self.texts[request.negative_prompt]
        latents = sample_latents(
            self.model,
            self.texts[request.prompt],
            negative,
            latent=request.latent,
            steps=request.steps,
            shift=request.shift,
            guidance=request.guidance,
            seed=request.seed,
            device=self.device,
        )
        return decode_frames(self.vae, latents)


def compare(
    models: TinyWan, loras: Mapping[str, Path], *, prompts: Path, dataset: Path, device: torch.device
) -> Comparison:
    """Draw the prompts by the base, by each of `loras` (the last of them being the finished one), and off again."""
    requests = resolve_all(read_prompts(prompts), TASKS[TASK])
    artist = Artist(models, requests, device)
    base, drawn, off = artist.draw("base"), {}, []
    for number, (name, path) in enumerate(loras.items(), 1):
        network = artist.adapt(path)
        drawn[name] = artist.draw(name)
        if number == len(loras):
            with network.enabled(False):
                off = artist.draw("LoRA off")
        eject(network)
    clips = dataset_clips(dataset, [request.pixels for request in requests])
    return Comparison(requests=requests, base=base, lora=drawn, off=off, dataset=clips)


def dataset_clips(path: Path, sizes: Sequence[PixelShape]) -> list[Frames]:
    """For each size another clip or picture that a dataset file trains on, with the pixels that are encoded of it."""
    items = plan_datasets(read_datasets(path), write_index=False).items
    clips: list[Frames] = []
    used: set[Path] = set()
    for size in sizes:
        fitting = [item for item in items if item.pixels == size]
        item = next((item for item in fitting if item.source.path not in used), fitting[0])
        used.add(item.source.path)
        ((_, frames),) = read_items([item])
        clips.append(frames)
    return clips
