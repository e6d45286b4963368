"""What fp8 maths change for training: losses, gradients and layers of a LoRA run, beside the same run in bf16 maths.

Usage: python benchmarks/fp8_error.py [14B] [tiny] [--steps 20] [--results DIR] [--device cuda]

Two LoRAs begin alike and see the same batches, noise levels and noise. One is trained with bf16 maths, one with fp8
maths, on the same frozen e4m3 weights with a scale per output; each follows its own gradients. After every step the two
losses and the cosine of the two gradients are noted, and for the first batch of every size the error of each layer.

`14B`: Wan's sizes and random weights, the reference mix of random latents; it wants a card with 40 GB, and without one
it rehearses on a small model. `tiny`: the tiny Wan that is shipped on clips of the small world in a look and a
motion that are new to it, as a user's LoRA has it, four in a batch; it also runs on a CPU, where fp8 maths are
emulated. A third LoRA there has the unquantised weights, to show what fp8 weights alone change.
"""

import argparse
import json
import platform
import random
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from benchmarks.materials import GEOMETRIES, LATENT_CHANNELS, TEXT_TOKENS, Bucket, draw_tensor
from wanlora.data.dataset import Batch
from wanlora.diffusion.timesteps import build_plan
from wanlora.diffusion.weighting import LOSS_WEIGHTINGS
from wanlora.foundation.files import write_json
from wanlora.foundation.random import Streams
from wanlora.foundation.shapes import LatentShape, PixelShape
from wanlora.lora.network import LoRANetwork, inject
from wanlora.lora.targets import candidates
from wanlora.memory.checkpointing import Recompute
from wanlora.memory.compile import compile_blocks
from wanlora.models.wan.checkpoint import load_transformer
from wanlora.models.wan.text import TextEncoder, load_tokenizer
from wanlora.models.wan.transformer import WanTransformer
from wanlora.models.wan.umt5 import load_umt5
from wanlora.models.wan.vae import load_vae
from wanlora.quantization.fast_linear import FastFp8Linear, fast_layers, wide_maths
from wanlora.quantization.installer import Fp8Installer
from wanlora.quantization.maths_error import LayerErrors, cosine
from wanlora.quickstart.shipped import PRETRAINED
from wanlora.quickstart.world import new_scenes, render
from wanlora.training.fp8_check import LEAST_COSINE, MOST_LOSS_ERROR
from wanlora.training.objective import FlowObjective, Noise

ROOT = Path(__file__).resolve().parent
TINY_SIZES = ((96, 96, 1, 2), (96, 64, 1, 4), (96, 64, 21, 5), (64, 48, 45, 9))
"""Width, height, frames and share of 20 steps: the reference mix on the small world's scale."""
TINY_BATCH = 4
_SHIFT = 3.0


@dataclass
class Runner:
    """One LoRA under one kind of maths: its weights, its optimizer, and the objective of its model."""

    name: str
    objective: FlowObjective
    network: LoRANetwork
    maths: Callable[[], AbstractContextManager[None]]
    weights: list[Tensor]
    optimizer: torch.optim.Optimizer

    def gradient(self, batch: Batch, index: int) -> tuple[Tensor, list[Tensor]]:
        """Loss and gradient at this LoRA's weights."""
        parameters: list[Tensor] = [*self.network.parameters()]
        with torch.no_grad():
            torch._foreach_copy_(parameters, self.weights)
        with self.maths():
            loss = self.objective(batch, 0, index).value
            return loss.detach(), list(torch.autograd.grad(loss, parameters))

    def update(self, gradient: Sequence[Tensor]) -> None:
        """One step of AdamW."""
        for weight, part in zip(self.weights, gradient, strict=True):
            weight.grad = part
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class Comparison:
    """Runs that begin alike; the first is what the others are measured by."""

    def __init__(
        self, batches: Sequence[Batch], *, rank: int, rate: float, device: torch.device, draw: int = 0
    ) -> None:
        self.batches, self.rank, self.rate, self.device = batches, rank, rate, device
        plan = build_plan("shift", discrete_flow_shift=_SHIFT)
        self.noise = Noise(Streams(7 + draw), plan, lambda epoch: [len(batch.text) for batch in batches])
        self.runners: list[Runner] = []

    def adapt(self, model: WanTransformer) -> tuple[FlowObjective, LoRANetwork]:
        """The objective of a model and a LoRA on all of its layers, blocks recomputed."""
        generator = torch.Generator().manual_seed(1)
        network = inject(
            model, candidates(model), rank=self.rank, alpha=self.rank, generator=generator, device=self.device
        )
        model.run_block = Recompute(list(model.blocks))
        model.train()
        return FlowObjective(model, self.noise, LOSS_WEIGHTINGS.get("none"), self.device), network

    def add(
        self,
        name: str,
        parts: tuple[FlowObjective, LoRANetwork],
        maths: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """One more run."""
        objective, network = parts
        weights = [parameter.detach().clone().requires_grad_() for parameter in network.parameters()]
        optimizer = torch.optim.AdamW(weights, lr=self.rate, fused=self.device.type == "cuda")
        self.runners.append(Runner(name, objective, network, maths, weights, optimizer))

    def run(self) -> list[dict[str, Any]]:
        """Train on every batch; a row for each."""
        rows = []
        for index, batch in enumerate(self.batches):
            found = [runner.gradient(batch, index) for runner in self.runners]
            exact_loss, exact = found[0]
            row: dict[str, Any] = {"batch": str(batch.pixels), f"loss/{self.runners[0].name}": exact_loss.item()}
            for runner, (loss, gradient) in zip(self.runners[1:], found[1:], strict=True):
                row[f"loss/{runner.name}"] = loss.item()
                row[f"loss_error/{runner.name}"] = (loss / exact_loss - 1).item()
                row[f"cosine/{runner.name}"] = cosine(gradient, exact).item()
            for runner, (_, gradient) in zip(self.runners, found, strict=True):
                runner.update(gradient)
            print(json.dumps({key: _short(value) for key, value in row.items()}), flush=True)
            rows.append(row)
        return rows


def compare_14b(steps: int, device: torch.device, compiled: bool, draw: int) -> dict[str, Any]:
    """Random weights of the 14B model on the reference mix."""
    geometry = GEOMETRIES["14B" if device.type == "cuda" else "tiny"]
    model = random_model(geometry.sizes, device)
    batches = random_batches(geometry.buckets, geometry.sizes.text_dim, steps)
    comparison = Comparison(batches, rank=32, rate=5e-5, device=device, draw=draw)
    parts = comparison.adapt(model)
    layers = fast_layers(model)
    errors = layer_errors(parts[0], layers, batches)
    if compiled:
        compile_blocks(model.blocks)
    comparison.add("bf16", parts, partial(wide_maths, layers.values()))
    comparison.add("fp8", parts)
    return verdict(comparison.run(), errors)


def compare_tiny(steps: int, device: torch.device, draw: int, size: int) -> dict[str, Any]:
    """The trained tiny Wan on a look and a motion that it has never seen."""
    batches = tiny_batches(steps, size)
    comparison = Comparison(batches, rank=16, rate=1e-3, device=device, draw=draw)
    load = partial(load_transformer, PRETRAINED.dit, "t2v-14B", device=device, dtype=torch.bfloat16, progress=False)
    model = load(install=Fp8Installer(device, torch.bfloat16, "rows"))
    parts = comparison.adapt(model)
    layers = fast_layers(model)
    errors = layer_errors(parts[0], layers, batches)
    comparison.add("bf16", parts, partial(wide_maths, layers.values()))
    comparison.add("fp8", parts)
    comparison.add("bf16 weights", comparison.adapt(load()))
    return verdict(comparison.run(), errors)


def random_model(sizes: Any, device: torch.device) -> WanTransformer:
    """A transformer of these sizes with the benchmarks' random weights, quantised as fp8 maths want them."""
    installer = Fp8Installer(device, torch.bfloat16, "rows")
    with torch.device("meta"):
        model = WanTransformer(sizes, compute_dtype=torch.bfloat16)
    generator = torch.Generator(device).manual_seed(0)
    for name, shape in {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}.items():
        installer(model, name, draw_tensor(name, shape, generator), None)
    return model.requires_grad_(False)


def random_batches(buckets: Sequence[Bucket], text_dim: int, steps: int) -> list[Batch]:
    """Random latents and texts, sizes as often as the mix has them."""
    generator = torch.Generator().manual_seed(1)
    order = random.Random(2).choices(buckets, [bucket.per_epoch for bucket in buckets], k=max(0, steps - len(buckets)))
    return [_random_batch(bucket.pixels, text_dim, generator) for bucket in [*buckets, *order][:steps]]


def _random_batch(pixels: PixelShape, text_dim: int, generator: torch.Generator) -> Batch:
    latent = LatentShape.of(pixels)
    shape = (1, LATENT_CHANNELS, latent.frames, latent.height, latent.width)
    latents = torch.randn(shape, generator=generator).to(torch.bfloat16)
    text = torch.randn((TEXT_TOKENS, text_dim), generator=generator).to(torch.bfloat16)
    return Batch(latents_BCFHW=latents, text=[text], names=("random",), pixels=pixels)


def tiny_batches(steps: int, size: int) -> list[Batch]:
    """Clips of new scenes through the tiny VAE and text encoder, batches of `size`."""
    vae = load_vae(PRETRAINED.vae, device="cpu")
    t5 = PRETRAINED.t5
    encoder = TextEncoder(load_umt5(t5, device="cpu"), load_tokenizer(None, t5, offline=True))
    sizes = [size[:3] for size in TINY_SIZES for _ in range(size[3])]
    random.Random(3).shuffle(sizes)
    batches = []
    for index, (width, height, frames) in enumerate((sizes * steps)[:steps]):
        scenes = new_scenes(size, 11 + index)
        pixels = rearrange(render(scenes, frames, width, height), "b f h w c -> b c f h w").float() / 127.5 - 1
        batches.append(
            Batch(
                latents_BCFHW=vae.encode(pixels).to(torch.bfloat16),
                text=encoder.encode([scene.caption for scene in scenes]),
                names=tuple(scene.caption for scene in scenes),
                pixels=PixelShape(width, height, frames),
            )
        )
    return batches


def layer_errors(
    objective: FlowObjective, layers: dict[str, FastFp8Linear], batches: Sequence[Batch]
) -> dict[str, Any]:
    """Errors of the layers' outputs over the first batch of each size."""
    first: dict[PixelShape, int] = {}
    for index, batch in enumerate(batches):
        first.setdefault(batch.pixels, index)
    with torch.no_grad(), LayerErrors(layers) as errors:
        for index in first.values():
            objective(batches[index], 0, index)
    found = {name.removesuffix(".base"): error for name, error in errors.result().items()}
    worst = sorted(found, key=lambda name: -found[name])[:8]
    kinds: dict[str, list[float]] = {}
    for name, error in found.items():
        kinds.setdefault(name.split(".", 2)[2], []).append(error)
    report = {
        "median": torch.tensor(list(found.values())).median().item(),
        "worst": {name: found[name] for name in worst},
        "mean_by_kind": {kind: sum(values) / len(values) for kind, values in kinds.items()},
    }
    print("errors of layers:", json.dumps({key: _short(value) for key, value in report.items()}), flush=True)
    return report


def verdict(rows: list[dict[str, Any]], errors: dict[str, Any]) -> dict[str, Any]:
    """The rows, their extremes, and whether the bounds hold."""
    loss = max(abs(row["loss_error/fp8"]) for row in rows)
    least = min(row["cosine/fp8"] for row in rows)
    good = loss <= MOST_LOSS_ERROR and least >= LEAST_COSINE
    print(f"largest loss error {loss:.2%}, least cosine {least:.4f}: {'within' if good else 'OUTSIDE'} the bounds")
    return {"largest_loss_error": loss, "least_cosine": least, "within_bounds": good, "layers": errors, "steps": rows}


def _short(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _short(part) for key, part in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value


def main(argv: Sequence[str] | None = None) -> int:
    """Run what was asked for; 1 if a bound does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["tiny"], help="14B, tiny")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--draw", type=int, default=0, help="another draw of noise and noise levels")
    parser.add_argument("--tiny_batch", type=int, default=TINY_BATCH, help="clips in a batch of the tiny Wan")
    parser.add_argument("--compile", action="store_true", help="compile the blocks of the 14B model")
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
    good = True
    for model in options.models:
        start = time.monotonic()
        tiny = model == "tiny"
        steps, draw = options.steps, options.draw
        report = (
            compare_tiny(steps, device, draw, options.tiny_batch)
            if tiny
            else compare_14b(steps, device, options.compile, draw)
        )
        conditions = {"model": model, "device": name, "torch": torch.__version__, "compiled": options.compile}
        report = conditions | {"draw": draw} | ({"batch_size": options.tiny_batch} if tiny else {}) | report
        kind = "h100" if "H100" in name else device.type
        other = f"-batch{options.tiny_batch}" if tiny and options.tiny_batch != TINY_BATCH else ""
        other += f"-draw{draw}" if draw else ""
        options.results.mkdir(parents=True, exist_ok=True)
        write_json(options.results / f"fp8-error-{model}-{kind}{other}.json", report)
        print(f"{model}: {time.monotonic() - start:.0f} s", flush=True)
        good &= report["within_bounds"]
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
