"""A Wan with the real structure and file formats, and random weights: 12 narrow blocks instead of 40 wide ones.

It is what tests use, which want every weight to matter and no file to depend on a training; the quickstart uses the
trained one (`shipped`).

Weights are drawn so that signals keep their size from layer to layer, as in a trained model, and the autoencoder's
last layers are scaled so that its latents and pictures have the usual spread. Nothing is left at zero, so a mistake
anywhere shows in the output. The same seed gives the same files.
"""

import io
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

from wanlora.foundation.blank import without_memory
from wanlora.foundation.files import write_bytes
from wanlora.foundation.random import Streams
from wanlora.foundation.tensor_files import save_tensors
from wanlora.models.wan.spec import WanSizes
from wanlora.models.wan.transformer import WanTransformer
from wanlora.models.wan.vae import VAE_MEAN, VAE_STD, VAESizes, WanVAE
from wanlora.quickstart.tiny_tokenizer import VOCABULARY, write_tokenizer
from wanlora.quickstart.world import base_scenes, render

TEXT_DIM = 64
"""Width of the text encoder and of its embeddings."""
SIZES = WanSizes(dim=128, ffn_dim=256, num_layers=12, text_dim=TEXT_DIM)
"""The transformer: one attention head of the usual width."""
VAE_SIZES = VAESizes(base=4, z=16)
"""The autoencoder: an encode of a second of video takes a fraction of a second on a CPU."""

_SMALL = 0.02
_TEXT_HEADS, _TEXT_LAYERS, _TEXT_FFN = 4, 2, 112
_POSITION_BUCKETS = 32

Shapes = Mapping[str, tuple[int, ...]]
Tensors = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class TinyWan:
    """The files of a tiny Wan 2.1."""

    dit: Path
    vae: Path
    t5: Path
    tokenizer: Path

    @classmethod
    def within(cls, folder: Path) -> "TinyWan":
        """The files' places in `folder`, laid out as the official release lays out its own."""
        return cls(
            dit=folder / "wan_tiny_t2v_bf16.safetensors",
            vae=folder / "wan_tiny_vae.safetensors",
            t5=folder / "models_t5_tiny-enc-bf16.pth",
            tokenizer=folder / "google" / "umt5-xxl" / "tokenizer.json",
        )

    @property
    def paths(self) -> tuple[Path, ...]:
        """All four."""
        return (self.dit, self.vae, self.t5, self.tokenizer)


def make_tiny_wan(folder: Path, seed: int = 0) -> TinyWan:
    """Write the four files into `folder`."""
    files = TinyWan.within(folder)
    streams = Streams(seed)
    write_tokenizer(files.tokenizer)
    save_tensors(files.dit, _in_bf16(transformer_weights(streams)))
    with _one_thread():
        save_tensors(files.vae, _vae_weights(streams))
    content = io.BytesIO()  # saved to a path, the name of the file would become part of it
    torch.save(_in_bf16(text_weights(streams)), content)
    write_bytes(files.t5, content.getvalue())
    return files


def transformer_weights(streams: Streams, sizes: WanSizes = SIZES) -> Tensors:
    """A transformer's tensors under their official names, float32."""
    with without_memory():
        model = WanTransformer(sizes)
    return _draw(_shapes(model), streams)


def text_weights(streams: Streams) -> Tensors:
    """A UMT5 encoder's tensors under their official names, float32."""
    return _draw(_text_shapes(), streams)


def _vae_weights(streams: Streams) -> Tensors:
    """An autoencoder's tensors, scaled on scenes: latents of unit variance, pictures with contrast."""
    vae = WanVAE(VAE_SIZES)
    vae.load_state_dict(_draw(_shapes(vae), streams))
    pixels_BCFHW = _clips()
    std, mean = torch.tensor(VAE_STD), torch.tensor(VAE_MEAN)
    raw = _per_channel(vae.encode(pixels_BCFHW)) * std[:, None] + mean[:, None]
    factor = std / raw.std(dim=1)
    log_variance = torch.zeros_like(factor)
    _scale_outputs(
        vae.conv1,
        factor=torch.cat([factor, log_variance + 1]),
        offset=torch.cat([mean - raw.mean(dim=1) * factor, log_variance]),
    )
    shown = _per_channel(vae.decode_unclamped(vae.encode(pixels_BCFHW)))
    factor = 0.4 / shown.std(dim=1)
    last = vae.decoder.head[2]
    assert isinstance(last, nn.Conv3d)
    _scale_outputs(last, factor=factor, offset=-shown.mean(dim=1) * factor)
    return vae.state_dict()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums come out the same however many threads the process may use."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _clips() -> Tensor:
    """A second of some scenes, as the autoencoder takes them."""
    clips = render(base_scenes(3, seed=0), frames=9, width=64, height=48, fps=8)
    return rearrange(clips.float() / 127.5 - 1, "b f h w c -> b c f h w")


def _per_channel(x_BCFHW: Tensor) -> Tensor:
    return rearrange(x_BCFHW, "b c f h w -> c (b f h w)")


def _scale_outputs(layer: nn.Conv3d, *, factor: Tensor, offset: Tensor) -> None:
    """Make every output channel `y` of `layer` into `factor` y + `offset`."""
    assert layer.bias is not None
    with torch.no_grad():
        layer.weight.mul_(rearrange(factor, "c -> c 1 1 1 1"))
        layer.bias.mul_(factor).add_(offset)


def _shapes(model: nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _text_shapes() -> Shapes:
    """Names and shapes of `models_t5_umt5-xxl-enc-bf16.pth`, made small."""
    square = (TEXT_DIM, TEXT_DIM)
    shapes: dict[str, tuple[int, ...]] = {"token_embedding.weight": (len(VOCABULARY), TEXT_DIM)}
    for layer in range(_TEXT_LAYERS):
        shapes |= {
            f"blocks.{layer}.norm1.weight": (TEXT_DIM,),
            **{f"blocks.{layer}.attn.{part}.weight": square for part in "qkvo"},
            f"blocks.{layer}.norm2.weight": (TEXT_DIM,),
            f"blocks.{layer}.ffn.gate.0.weight": (_TEXT_FFN, TEXT_DIM),
            f"blocks.{layer}.ffn.fc1.weight": (_TEXT_FFN, TEXT_DIM),
            f"blocks.{layer}.ffn.fc2.weight": (TEXT_DIM, _TEXT_FFN),
            f"blocks.{layer}.pos_embedding.embedding.weight": (_POSITION_BUCKETS, _TEXT_HEADS),
        }
    return shapes | {"norm.weight": (TEXT_DIM,)}


def _draw(shapes: Shapes, streams: Streams) -> Tensors:
    """Random values for each tensor, by its place in the file and its kind."""
    tensors = {}
    for position, (name, shape) in enumerate(shapes.items()):
        mean, deviation = _distribution(name, shape)
        noise = torch.randn(shape, generator=streams.generator("init", position))
        tensors[name] = mean + deviation * noise
    return tensors


def _distribution(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation: matrices keep the size of what they act on, gains lie around one."""
    if name.endswith("gamma") or ("norm" in name and name.endswith("weight")):
        return 1.0, 0.1
    if name.endswith("bias"):
        return 0.0, _SMALL
    if name.endswith("modulation"):
        return 0.0, shape[-1] ** -0.5
    if name == "token_embedding.weight":
        return 0.0, 1.0
    fan_in = math.prod(shape[1:])
    if name.endswith("attn.q.weight") and "self_attn" not in name and "cross_attn" not in name:
        return 0.0, (fan_in * TEXT_DIM / _TEXT_HEADS) ** -0.5  # UMT5 does not divide scores by the head's width
    return 0.0, fan_in**-0.5


def _in_bf16(tensors: Mapping[str, Tensor]) -> Tensors:
    return {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
