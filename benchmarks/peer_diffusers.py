"""Seconds per step of the fastest peer: diffusers' Wan transformer with a LoRA of peft, on the same mix and card.

Usage: python benchmarks/peer_diffusers.py compile --geometry 14B --log steps.jsonl

It is trained as somebody would who knows both packages: bf16, every block recomputed, AdamW8bit, blocks compiled by
`compile_repeated_blocks` (or not: `eager`). Weights, latents and texts are random, texts have 512 rows, as the model
pads every text to. A bucket's steps follow each other; each is timed between two synchronisations of the device. A line
of the log is written after every step, in the form of the trainer's own step log, so that the same code reads both.
`training_step.py` starts this program for the settings `peer-compile` and `peer-eager`.
"""

import argparse
import importlib.util
import json
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.machine import package_version
from benchmarks.materials import GEOMETRIES, LATENT_CHANNELS, Bucket
from wanlora.foundation.shapes import LatentShape
from wanlora.models.wan.spec import WanSizes

MODES = ("compile", "eager")
STEPS, WARMUP = 8, 3
"""Of each bucket; and the first of them that are not timed."""
_PACKAGES = ("diffusers", "peft")
_RANK = 32
_ADAPTED = ("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2")
_TEXT_ROWS = 512
_RATE = 5e-5
_GIB = 2**30


def main(argv: Sequence[str] | None = None) -> int:
    """Train on every bucket; 2 if a package is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=MODES, help="whether blocks are compiled")
    parser.add_argument("--geometry", choices=GEOMETRIES, default="14B", help="size of the transformer")
    parser.add_argument("--log", type=Path, required=True, help="the step log to write, JSON lines")
    options = parser.parse_args(argv)
    missing = missing_packages()
    if missing:
        print(missing, file=sys.stderr)
        return 2
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    geometry = GEOMETRIES[options.geometry]
    model = build_model(geometry.sizes, device, compiled=options.mode == "compile")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    print(f"{title(options.mode)}: {sum(map(Tensor.numel, trained)) / 1e6:.1f} million trained numbers", flush=True)
    optimizer = build_optimizer(trained, device)
    with options.log.open("w", encoding="utf-8") as log:
        for bucket in geometry.buckets:
            for row in train(model, optimizer, bucket, geometry.sizes.text_dim, device):
                log.write(json.dumps(row) + "\n")
                log.flush()
                print(f"{row['bucket']}: {row['seconds']:.4f} s", flush=True)
    return 0


def missing_packages() -> str:
    """What cannot be measured for want of which package, and the cure; empty if all are there."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if not missing:
        return ""
    return (
        f"the peer cannot be measured: {' and '.join(missing)} not installed; pip install {' '.join(missing)}, or "
        "carry the wheels (benchmarks/README.md says how)"
    )


def title(mode: str) -> str:
    """The peer by its versions."""
    packages = " + ".join(f"{name} {package_version(name)}" for name in _PACKAGES)
    return f"{packages}, bf16, {'compile_repeated_blocks' if mode == 'compile' else 'eager'}"


def build_model(sizes: WanSizes, device: torch.device, *, compiled: bool) -> nn.Module:
    """The peer's transformer in bf16 with random weights, adapted, every block recomputed."""
    from diffusers import WanTransformer3DModel
    from peft import LoraConfig, inject_adapter_in_model

    torch.set_default_dtype(torch.bfloat16)
    with device:
        model: Any = WanTransformer3DModel(
            num_attention_heads=sizes.num_heads,
            attention_head_dim=sizes.head_dim,
            in_channels=sizes.in_channels,
            out_channels=sizes.out_channels,
            ffn_dim=sizes.ffn_dim,
            num_layers=sizes.num_layers,
            text_dim=sizes.text_dim,
            freq_dim=sizes.freq_dim,
        )
    torch.set_default_dtype(torch.float32)
    model.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=_RANK, lora_alpha=_RANK, target_modules=list(_ADAPTED)), model)
    model.enable_gradient_checkpointing()
    model.train()
    if compiled:
        model.compile_repeated_blocks()
    peer: nn.Module = model
    return peer


def build_optimizer(trained: Sequence[nn.Parameter], device: torch.device) -> torch.optim.Optimizer:
    """AdamW8bit; plain AdamW in a rehearsal without a card."""
    if device.type != "cuda":
        return torch.optim.AdamW(trained, lr=_RATE)
    import bitsandbytes

    optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(trained, lr=_RATE)
    return optimizer


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, bucket: Bucket, text_dim: int, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Time and peak memory of each step on a bucket, in the form of a step log."""
    latent = LatentShape.of(bucket.pixels)
    for step in range(1, STEPS + 1):
        _settle(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        loss = _step(model, optimizer, latent, text_dim, device)
        _settle(device)
        seconds = time.perf_counter() - begin
        row: dict[str, Any] = {"step": step, "bucket": str(bucket.pixels), "seconds": seconds, "loss": loss.item()}
        if device.type == "cuda":
            row["memory/peak_gib"] = torch.cuda.max_memory_allocated() / _GIB
        yield row


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, latent: LatentShape, text_dim: int, device: torch.device
) -> Tensor:
    """Forward, backward and update on a random sample; the loss."""
    shape = (1, LATENT_CHANNELS, latent.frames, latent.height, latent.width)
    x0_BCFHW = torch.randn(shape, device=device, dtype=torch.bfloat16)
    x1_BCFHW = torch.randn_like(x0_BCFHW)
    t_B = torch.rand(1, device=device)
    text_BTD = torch.randn(1, _TEXT_ROWS, text_dim, device=device, dtype=torch.bfloat16)
    x_t = ((1 - t_B) * x0_BCFHW + t_B * x1_BCFHW).to(torch.bfloat16).requires_grad_()
    with torch.autocast(device.type, torch.bfloat16):
        (v,) = model(hidden_states=x_t, timestep=t_B * 1000, encoder_hidden_states=text_BTD, return_dict=False)
    loss = nn.functional.mse_loss(v.float(), (x1_BCFHW - x0_BCFHW).float())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
