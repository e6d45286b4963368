"""Whether a LoRA file makes the shipped Wan better at clips that it was not trained on: a second opinion.

No code of the trainer is used. The models are those of diffusers and transformers, loaded with diffusers' own key maps;
the normalisation of latents is typed here, from the official code (Wan2.1 wan/modules/vae.py); the LoRA file is read
tensor by tensor and added to the weights by plain arithmetic. Clips, noise and noise levels are fixed, so the loss of
the base model is one number for ever.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.loaders.single_file_utils import (
    convert_wan_transformer_to_diffusers,
    convert_wan_vae_to_diffusers,
)
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from wanlora.quickstart.world import Scene, new_scenes, render

# fmt: off
MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
       3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)
# fmt: on
FRAMES, WIDTH, HEIGHT = 21, 64, 48
LEVELS = (0.1, 0.25, 0.5, 0.75, 0.9)
_NUM_CLIPS, _SCENE_SEED, _NOISE_SEED = 6, 77, 78
_TEXT_ROWS = 512
_T5_NAMES = {
    "norm1.": "layer.0.layer_norm.",
    "attn.": "layer.0.SelfAttention.",
    "pos_embedding.embedding.": "layer.0.SelfAttention.relative_attention_bias.",
    "norm2.": "layer.1.layer_norm.",
    "ffn.gate.0.": "layer.1.DenseReluDense.wi_0.",
    "ffn.fc1.": "layer.1.DenseReluDense.wi_1.",
    "ffn.fc2.": "layer.1.DenseReluDense.wo.",
}


def plain_scenes(count: int, seed: int) -> tuple[Scene, ...]:
    """The new motion in a look that the base knows.

    What is left to learn is subtle, so a small mistake in training spoils it; the new look would drown the difference.
    """
    return tuple(replace(scene, style="plain") for scene in new_scenes(count, seed))


@dataclass(frozen=True, kw_only=True, slots=True)
class Files:
    """The model's files."""

    dit: Path
    vae: Path
    t5: Path
    tokenizer: Path


class Evaluator:
    """Holds what is fixed: weights, latents, features of captions, noise."""

    def __init__(self, files: Files) -> None:
        self.weights = {name: tensor.float() for name, tensor in load_file(files.dit).items()}
        scenes = plain_scenes(_NUM_CLIPS, _SCENE_SEED)
        pixels = render(scenes, FRAMES, WIDTH, HEIGHT).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        self.latents = encoded(files.vae, pixels)
        self.text = features(files, [scene.caption for scene in scenes])
        generator = torch.Generator().manual_seed(_NOISE_SEED)
        self.noise = [torch.randn(self.latents.shape, generator=generator) for _ in LEVELS]

    def loss(self, lora: Path | None = None) -> float:
        """The mean squared error of the velocity over clips and noise levels, with or without a LoRA file."""
        model = transformer(self.weights if lora is None else merged(self.weights, load_file(lora)))
        losses = [self._loss(model, t, noise) for t, noise in zip(LEVELS, self.noise, strict=True)]
        return sum(losses) / len(losses)

    @torch.no_grad()
    def _loss(self, model: WanTransformer3DModel, t: float, noise: Tensor) -> float:
        x = (1 - t) * self.latents + t * noise
        timestep = torch.full((len(x),), 1000 * t)
        predicted = model(x, timestep, self.text, return_dict=False)[0]
        return float((predicted - (noise - self.latents)).square().mean())


def merged(weights: Mapping[str, Tensor], lora: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights with alpha / rank times up @ down added; without a stored alpha, alpha is the rank."""
    changed = dict(weights)
    names = {"lora_unet_" + name.removesuffix(".weight").replace(".", "_"): name for name in weights}
    for key, down in lora.items():
        module, _, part = key.partition(".")
        if part == "lora_down.weight":
            up, rank = lora[f"{module}.lora_up.weight"].float(), len(down)
            alpha = float(lora.get(f"{module}.alpha", torch.tensor(rank)))
            changed[names[module]] = weights[names[module]] + alpha / rank * up @ down.float()
    return changed


def transformer(weights: Mapping[str, Tensor]) -> WanTransformer3DModel:
    """diffusers' transformer with these official weights."""
    dim = weights["time_embedding.0.weight"].shape[0]
    with torch.device("meta"):
        model = WanTransformer3DModel(
            num_attention_heads=dim // 128,
            attention_head_dim=128,
            text_dim=weights["text_embedding.0.weight"].shape[1],
            ffn_dim=weights["blocks.0.ffn.0.weight"].shape[0],
            num_layers=1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks.")),
        )
    rope = WanTransformer3DModel(num_attention_heads=1, attention_head_dim=128, num_layers=1, ffn_dim=8).rope
    model.load_state_dict(convert_wan_transformer_to_diffusers(dict(weights)), assign=True)
    model.rope = rope
    return model.eval()


@torch.no_grad()
def encoded(path: Path, pixels: Tensor) -> Tensor:
    """Normalised latents of clips [B, 3, F, H, W] in [-1, 1]."""
    weights = convert_wan_vae_to_diffusers({name: tensor.float() for name, tensor in load_file(path).items()})
    vae = AutoencoderKLWan(base_dim=weights["encoder.conv_in.weight"].shape[0], z_dim=16).eval()
    vae.load_state_dict(weights)
    raw: Tensor = vae.encode(pixels).latent_dist.mode()
    return (raw - torch.tensor(MEAN).view(-1, 1, 1, 1)) / torch.tensor(STD).view(-1, 1, 1, 1)


@torch.no_grad()
def features(files: Files, captions: Sequence[str]) -> Tensor:
    """Features [B, 512, D] of captions, zero behind their last token."""
    weights = {name: tensor.float() for name, tensor in torch.load(files.t5, weights_only=True).items()}
    vocabulary, width = weights["token_embedding.weight"].shape
    heads = weights["blocks.0.pos_embedding.embedding.weight"].shape[1]
    config = UMT5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=weights["blocks.0.attn.q.weight"].shape[0] // heads,
        d_ff=weights["blocks.0.ffn.fc1.weight"].shape[0],
        num_heads=heads,
        num_layers=sum(name.endswith("attn.q.weight") for name in weights),
    )
    model = UMT5EncoderModel(config).eval()
    model.load_state_dict(t5_weights(weights), strict=False)
    tokenizer = Tokenizer.from_file(str(files.tokenizer))
    found = [model(torch.tensor([tokenizer.encode(caption).ids])).last_hidden_state[0] for caption in captions]
    return torch.stack([F.pad(one, (0, 0, 0, _TEXT_ROWS - len(one))) for one in found])


def t5_weights(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers' names."""
    renamed = {
        "shared.weight": official["token_embedding.weight"],
        "encoder.embed_tokens.weight": official["token_embedding.weight"],
        "encoder.final_layer_norm.weight": official["norm.weight"],
    }
    for name, tensor in official.items():
        if name.startswith("blocks."):
            _, number, rest = name.split(".", 2)
            prefix = next(prefix for prefix in _T5_NAMES if rest.startswith(prefix))
            renamed[f"encoder.block.{number}.{_T5_NAMES[prefix]}{rest.removeprefix(prefix)}"] = tensor
    return renamed
