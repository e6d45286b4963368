"""Trains the tiny Wan's text encoder and transformer together, by flow matching on latents of the small world.

Usage: python -m benchmarks.tiny_wan.train_dit --vae FILE --out DIR [--start DIR] [--seconds 450] [--rehearse]

The base sees scenes of the world and their captions, never the comic style, the word for it, or the motion
"flies". A tenth of the captions is replaced by the empty prompt or by the official negative prompt, for guidance.
Clips are encoded into pools on the device, one for each size, and a share of the time goes into replacing them by new
ones. Afterwards the exported files are measured through the ordinary loaders and the ordinary sampling.
"""

import argparse
import io
import json
import math
import platform
import random
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from benchmarks.tiny_wan.common import Average, Clock, Frames, contact_sheet, in_bf16, learning_rate
from benchmarks.tiny_wan.language import (
    TEXT_ROWS,
    Spelling,
    buckets_of,
    spoken,
    text_features,
    write_tokenizer,
)
from wanlora.diffusion.flow import interpolate, model_timestep, shift_time, velocity
from wanlora.foundation.files import write_bytes, write_json
from wanlora.foundation.shapes import WAN21_STRIDE, LatentShape, PixelShape
from wanlora.foundation.tensor_files import open_tensors, save_tensors
from wanlora.generation.pipeline import decode_frames, sample_latents
from wanlora.memory.compile import compile_blocks, restore_blocks
from wanlora.models.wan.blocks import WanAttention, WanCrossAttention
from wanlora.models.wan.checkpoint import load_transformer
from wanlora.models.wan.layers import project, unpatchify
from wanlora.models.wan.negative import NEGATIVE_PROMPT
from wanlora.models.wan.spec import WanSizes
from wanlora.models.wan.text import TextEncoder, load_tokenizer
from wanlora.models.wan.tokens import JsonTokenizer
from wanlora.models.wan.transformer import WanTransformer
from wanlora.models.wan.umt5 import UMT5Encoder, UMT5Sizes, load_umt5
from wanlora.models.wan.vae import WanVAE, load_vae
from wanlora.quickstart.world import base_scenes, follows, look_score, motion_score, new_scenes, render

DIT, T5, TOKENIZER = "wan_tiny_t2v_bf16.safetensors", "models_t5_tiny-enc-bf16.pth", "google/umt5-xxl/tokenizer.json"
TEXT_DIM = 64
SIZES = WanSizes(dim=256, ffn_dim=448, num_layers=4, text_dim=TEXT_DIM)
BUCKETS = (  # frames, width, height, share of the steps
    (1, 96, 96, 2),
    (1, 112, 80, 1),
    (1, 80, 112, 1),
    (1, 96, 64, 1),
    (21, 96, 64, 6),
    (45, 64, 48, 5),
)
LEARNING_RATE = 1.2e-3
SHIFT = 3.0
BATCH, POOL, ENCODED_AT_ONCE = 256, 16384, 256
FRESH_SHARE = 0.1
"""Of the time after the first filling goes into new clips."""
CLIP, LONG_CLIP, PICTURE = (21, 96, 64), (45, 64, 48), (1, 96, 96)


def text_sizes(vocab: int) -> UMT5Sizes:
    """The text encoder: two layers as wide as the embeddings."""
    return UMT5Sizes(vocab=vocab, dim=TEXT_DIM, attention_dim=TEXT_DIM, ffn_dim=112, num_heads=4, num_layers=2)


def initialise(transformer: WanTransformer, encoder: UMT5Encoder) -> None:
    """Velocity 0 at first; queries of the text encoder small, since nothing scales their scores."""
    for name, layer in transformer.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv3d):
            nn.init.xavier_uniform_(layer.weight.flatten(1))
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
            if name.startswith(("text_embedding", "time_embedding")):
                nn.init.normal_(layer.weight, std=0.02 if name.startswith("time") else TEXT_DIM**-0.5)
    nn.init.zeros_(transformer.head.head.weight)
    nn.init.normal_(encoder.token_embedding.weight)
    sizes = encoder.sizes
    for name, layer in encoder.named_modules():
        if isinstance(layer, nn.Linear):
            wanted = (sizes.dim * sizes.attention_dim / sizes.num_heads) if name.endswith("attn.q") else sizes.dim
            nn.init.normal_(layer.weight, std=(sizes.ffn_dim if name.endswith("fc2") else wanted) ** -0.5)
        elif name.endswith("pos_embedding.embedding"):
            nn.init.normal_(layer.weight, std=0.1)


@contextmanager
def fast_attention(text_len: int) -> Iterator[None]:
    """Train with few text rows as if there were `text_len`.

    Rows of padding are all alike, so one of them with log(how many) added to its score stands for all that are left
    out: the same function. Attention computes in bfloat16 on the card.
    """
    attend, cross = WanAttention.attend, WanCrossAttention.forward
    more = math.log(text_len - TEXT_ROWS + 1)

    def narrow(x: Tensor) -> Tensor:
        return x.to(torch.bfloat16) if x.is_cuda else x

    def attend_fast(self: WanAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = narrow(q.transpose(1, 2)), narrow(k.transpose(1, 2)), narrow(v.transpose(1, 2))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        out: Tensor = self.o(mixed.flatten(-2))
        return out

    def cross_fast(self: WanCrossAttention, x_BLD: Tensor, text_BTD: Tensor) -> Tensor:
        k, v = project(text_BTD, (self.k, self.v))
        rows = (self.norm_q(self.q(x_BLD)), self.norm_k(k), v)
        q, k, v = (narrow(self.heads(x)).transpose(1, 2) for x in rows)
        scores = (q @ k.transpose(-1, -2)).float() * self.head_dim**-0.5
        scores = torch.cat((scores[..., :-1], scores[..., -1:] + more), dim=-1)
        mixed = narrow(scores.softmax(dim=-1)) @ v
        out: Tensor = self.o(mixed.transpose(1, 2).flatten(-2))
        return out

    WanAttention.attend, WanCrossAttention.forward = attend_fast, cross_fast  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        WanAttention.attend, WanCrossAttention.forward = attend, cross  # type: ignore[method-assign]


def predict(model: WanTransformer, x_BCFHW: Tensor, t_B: Tensor, features_BTD: Tensor) -> Tensor:
    """`WanTransformer.forward` on text features that are short of padding; blocks in bfloat16 on the card."""
    latent = LatentShape(*x_BCFHW.shape[2:])
    x_BLD = model.patch_embedding(x_BCFHW)
    time_BD, time_B6D = model.embed_time(model_timestep(t_B))
    text_BTD = model.text_embedding(features_BTD)
    rope_2Lk = model.rope.get(latent, x_BLD.device)
    on_card = x_BLD.is_cuda
    half: AbstractContextManager[Any] = (
        torch.autocast("cuda", torch.bfloat16, cache_enabled=False) if on_card else nullcontext()
    )
    with half:
        for block in model.blocks:
            x_BLD = block(x_BLD, time_B6D, text_BTD, rope_2Lk)
    return unpatchify(model.head(x_BLD, time_BD), latent)


@dataclass
class Pool:
    """Encoded clips of one size and the tokens of their captions."""

    frames: int
    width: int
    height: int
    latents: Tensor
    ids: Tensor
    count: Tensor
    """How many there are, on the device."""
    filled: int = 0
    written: int = 0


def _pieces(tokenizer: Path) -> list[str]:
    return [piece for piece, _ in json.loads(tokenizer.read_text(encoding="utf-8"))["model"]["vocab"]]


class Pools:
    """One pool for each bucket, filled with scenes never drawn before."""

    def __init__(self, vae: WanVAE, spelling: Spelling, device: torch.device, size: int, seed: int) -> None:
        self.vae, self.spelling, self.device = vae, spelling, device
        self.seed = seed
        self.random = random.Random(seed)
        self.seconds = 0.0
        self.pools = [self._empty(size, *bucket[:3]) for bucket in BUCKETS]

    def _empty(self, size: int, frames: int, width: int, height: int) -> Pool:
        latent = LatentShape.of(PixelShape(width, height, frames), WAN21_STRIDE)
        shape = (size, 16, latent.frames, latent.height, latent.width)
        latents = torch.empty(shape, device=self.device, dtype=torch.bfloat16)
        ids = torch.empty(size, TEXT_ROWS, device=self.device, dtype=torch.long)
        return Pool(frames, width, height, latents, ids, torch.zeros((), device=self.device))

    @torch.no_grad()
    def encode(self, index: int, count: int) -> None:
        """Put `count` new clips into a pool, over the oldest ones once it is full."""
        self._wait()
        start, pool = time.monotonic(), self.pools[index]
        self.seed += 1
        scenes = base_scenes(count, self.seed)
        pixels = rearrange(
            render(scenes, pool.frames, pool.width, pool.height, device=self.device), "b f h w c -> b c f h w"
        )
        latents = self.vae.encode(pixels.float().div_(127.5).sub_(1), chunk=pool.frames)
        texts = [spoken(scene, self.random, still_picture=pool.frames == 1) for scene in scenes]
        first = pool.written % len(pool.latents)
        stop = min(first + count, len(pool.latents))
        pool.latents[first:stop] = latents[: stop - first]
        pool.ids[first:stop] = self.spelling.ids(texts)[: stop - first].to(self.device)
        pool.written = stop
        pool.filled = max(pool.filled, stop)
        pool.count.fill_(pool.filled)
        self._wait()
        self.seconds += time.monotonic() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def fill(self, seconds: float, count: int) -> None:
        """Encode in turn, `count` clips at a time, until all are full or the time is up (each holds something)."""
        start, turn = time.monotonic(), 0
        while any(pool.filled < len(pool.latents) for pool in self.pools):
            index = turn % len(self.pools)
            if self.pools[index].filled < len(self.pools[index].latents):
                self.encode(index, count)
            turn += 1
            if time.monotonic() - start > seconds and turn >= len(self.pools):
                break

    def batch(self, index: int, count: int) -> tuple[Tensor, Tensor]:
        """Latents float32 and token ids of random clips of a pool."""
        pool = self.pools[index]
        rows = (torch.rand(count, device=self.device) * pool.count).long()
        return pool.latents[rows].float(), pool.ids[rows]


class Trainer:
    """Models, optimizer and averages."""

    def __init__(self, out: Path, vae: Path, device: torch.device, pool: int, start: Path | None = None) -> None:
        torch.manual_seed(0)
        self.out, self.device = out, device
        write_tokenizer(out / TOKENIZER)
        tokenizer = JsonTokenizer(out / TOKENIZER)
        self.transformer, self.encoder = WanTransformer(SIZES), UMT5Encoder(text_sizes(tokenizer.num_ids))
        initialise(self.transformer, self.encoder)
        if start:
            self.go_on_from(start)
        self.transformer.to(device)
        self.encoder.to(device).requires_grad_(True)
        self.buckets = buckets_of(self.encoder, device)
        spelling = Spelling(tokenizer)
        self.nothing = spelling.ids(["", NEGATIVE_PROMPT]).to(device)
        self.pools = Pools(load_vae(vae, device=device), spelling, device, pool, seed=1_000_000)
        models = [self.transformer, self.encoder]
        self.parameters = [parameter for model in models for parameter in model.parameters()]
        decayed = [p for p in self.parameters if p.ndim == 2 and p is not self.encoder.token_embedding.weight]
        others = [p for p in self.parameters if not any(p is one for one in decayed)]
        groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
        on_card = device.type == "cuda"
        self.rate = torch.zeros((), device=device)
        rate = self.rate if on_card else 0.0
        self.optimizer = torch.optim.AdamW(groups, rate, betas=(0.9, 0.98), fused=on_card, capturable=on_card)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        self._recorded: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.average = Average(models, 0.9995)

    def go_on_from(self, start: Path) -> None:
        """Take over the weights of an earlier training; embeddings follow their pieces, whose ids may differ."""
        with open_tensors(start / DIT) as source:
            self.transformer.load_state_dict({name: source.read(name).float() for name in source.names})
        old = torch.load(start / T5, weights_only=True)
        embeddings = self.encoder.token_embedding.weight.detach().clone()
        ids = {piece: row for row, piece in enumerate(_pieces(self.out / TOKENIZER))}
        for row, piece in enumerate(_pieces(start / TOKENIZER)):
            if piece in ids:
                embeddings[ids[piece]] = old["token_embedding.weight"][row].float()
        self.encoder.load_state_dict(
            {name: tensor.float() for name, tensor in old.items()} | {"token_embedding.weight": embeddings}
        )

    def loss(self, index: int, count: int) -> Tensor:
        """Mean squared error of the velocity on random clips of a bucket at random noise levels."""
        x0, ids_BT = self.pools.batch(index, count)
        u_B1 = torch.rand(count, 1, device=self.device)
        ids_BT = torch.where(u_B1 < 0.05, self.nothing[0], ids_BT)
        ids_BT = torch.where(u_B1 > 0.95, self.nothing[1], ids_BT)
        x1 = torch.randn_like(x0)
        t_B = shift_time(torch.rand(count, device=self.device), SHIFT)
        features_BTD = text_features(self.encoder, ids_BT, self.buckets)
        out = predict(self.transformer, interpolate(x0, x1, t_B), t_B, features_BTD)
        return (out - velocity(x0, x1)).square().mean()

    def step(self, index: int, count: int, rate: float) -> Tensor:
        """One update; the loss stays on the device. On a card each bucket's step is recorded once and replayed."""
        self.rate.fill_(rate)
        if self.device.type != "cuda":
            loss = self._step(index, count)
        else:
            if index not in self._recorded:
                self._recorded[index] = self._record(index, count)
            graph, loss = self._recorded[index]
            graph.replay()
        self.average.update()
        return loss

    def _step(self, index: int, count: int) -> Tensor:
        torch._foreach_zero_([parameter.grad for parameter in self.parameters])
        loss = self.loss(index, count)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        return loss.detach()

    def _record(self, index: int, count: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._step(index, count)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = self._step(index, count)
        return graph, loss

    def export(self, prefix: str = "") -> None:
        """Write the averaged weights as official files."""
        self.average.swap()
        save_tensors(self.out / f"{prefix}{DIT}", in_bf16(self.transformer.state_dict()), {"format": "pt"})
        content = io.BytesIO()
        torch.save(in_bf16(self.encoder.state_dict()), content)
        write_bytes(self.out / f"{prefix}{T5}", content.getvalue())
        self.average.swap()


def train(trainer: Trainer, seconds: float, peak: float, rehearse: bool, compiled: bool) -> dict[str, Any]:
    """Fill the pools, train until the time is up, export."""
    clock, device = Clock(seconds), trainer.device
    count = sum(parameter.numel() for parameter in trainer.parameters)
    print(f"{count / 1e6:.2f} M parameters on {device}", flush=True)
    trainer.pools.fill(0 if rehearse else min(60, seconds / 6), 2 if rehearse else ENCODED_AT_ONCE)
    filled = [pool.filled for pool in trainer.pools.pools]
    print(f"{clock.elapsed:6.1f} s  pools: {filled}", flush=True)
    if compiled:
        compile_blocks(trainer.transformer.blocks, cache_size_limit=64)
    order = random.Random(3)
    batch = 2 if rehearse else BATCH
    shares = [bucket[3] for bucket in BUCKETS]
    means = [torch.zeros((), device=device) for _ in BUCKETS]
    counts = [0] * len(BUCKETS)
    history: list[dict[str, Any]] = []
    begin, encoding, saved, step = clock.elapsed, trainer.pools.seconds, clock.elapsed, 0
    while clock.share < 1 and not (rehearse and step >= 12):
        index = step if step < len(BUCKETS) else order.choices(range(len(BUCKETS)), shares)[0]
        share = (clock.elapsed - begin) / (clock.seconds - begin)
        rate = learning_rate(peak, step, share, warmup=500)
        loss = trainer.step(index, batch, rate)
        means[index] = means[index].lerp(loss, 0.02 if counts[index] else 1.0)
        counts[index] += 1
        step += 1
        if step in (1, 10, 50) or step % 500 == 0:
            losses = {_title(bucket): round(mean.item(), 4) for bucket, mean in zip(BUCKETS, means, strict=True)}
            history.append({"step": step, "seconds": round(clock.elapsed, 1), "losses": losses})
            print(f"{clock.elapsed:6.1f} s  step {step}  {' '.join(f'{x:.3f}' for x in losses.values())}", flush=True)
        if trainer.pools.seconds - encoding < FRESH_SHARE * (clock.elapsed - begin):
            trainer.pools.encode(order.choices(range(len(BUCKETS)), shares)[0], 2 if rehearse else ENCODED_AT_ONCE)
        if clock.elapsed - saved > 60:
            trainer.export("checkpoint_")
            saved = clock.elapsed
    restore_blocks(trainer.transformer.blocks)
    trainer.export()
    print(f"{clock.elapsed:6.1f} s  {step} steps, {trainer.pools.seconds:.0f} s of them spent encoding", flush=True)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    settings = {"parameters": count, "steps": step, "batch": batch, "seconds": seconds, "device": machine}
    settings |= {"torch": torch.__version__, "learning_rate": peak, "shift": SHIFT, "pools": filled}
    return {"settings": settings, "training": history}


def _title(bucket: tuple[int, ...]) -> str:
    return f"{bucket[0]}x{bucket[1]}x{bucket[2]}"


class Studio:
    """The exported files behind the ordinary loaders."""

    def __init__(self, out: Path, vae: Path, device: torch.device, steps: int) -> None:
        self.device, self.steps = device, steps
        self.vae = load_vae(vae, device=device)
        self.transformer = load_transformer(out / DIT, "t2v-14B", device=device, dtype=torch.bfloat16, progress=False)
        tokenizer = load_tokenizer(None, out / T5, offline=True)
        self.text = TextEncoder(load_umt5(out / T5, device=device), tokenizer)
        self.negative = self.text.encode([NEGATIVE_PROMPT])[0]

    def sample(self, prompt: str, frames: int, width: int, height: int, seed: int, guidance: float = 1.0) -> Frames:
        """Frames [F, H, W, 3] of a prompt."""
        latents = sample_latents(
            self.transformer,
            self.text.encode([prompt])[0],
            self.negative,
            latent=LatentShape.of(PixelShape(width, height, frames), WAN21_STRIDE),
            steps=self.steps,
            shift=SHIFT,
            guidance=guidance,
            seed=seed,
            device=self.device,
        )
        return decode_frames(self.vae, latents)


def evaluate(studio: Studio, count: int, seconds: float, sheet: Path) -> dict[str, Any]:
    """How often samples follow their captions, and how much of the new look and motion the base shows."""
    clock = Clock(seconds)
    report: dict[str, Any] = {}
    rows: list[list[Frames]] = []
    kinds = (("clips", CLIP, 4, 1.0), ("long clips", LONG_CLIP, 3, 1.0), ("pictures", PICTURE, 2, 1.0))
    for name, size, share, guidance in (*kinds, ("clips, guidance 2", CLIP, 2, 2.0)):
        marks: list[dict[str, bool]] = []
        for seed, scene in enumerate(base_scenes(max(1, count * share // 4), 31)):
            if clock.share >= 1 and marks:
                break
            frames = studio.sample(scene.caption, *size, seed, guidance)
            marks.append(follows(frames, scene))
            rows += [[frames]] if seed < 6 else []
        shares = {key: float(np.mean([mark[key] for mark in marks])) for key in marks[0]}
        report[name] = {"samples": len(marks), **shares}
        print(f"{clock.elapsed:6.1f} s  {name}: {report[name]}", flush=True)
    report |= _new_things(studio, max(2, count // 4), clock, rows)
    contact_sheet(sheet, rows)
    return report


def _new_things(studio: Studio, count: int, clock: Clock, rows: list[list[Frames]]) -> dict[str, Any]:
    """Scores of the base on prompts with the trigger, beside those of rendered scenes."""
    looks, motions, scenes = [], [], new_scenes(count, 32)
    for seed, scene in enumerate(scenes):
        if clock.elapsed > clock.seconds * 1.4 and looks:
            break
        frames = studio.sample(scene.caption, *CLIP, seed)
        looks.append(look_score(frames))
        motions.append(motion_score(frames))
        rows += [[frames]] if seed < 6 else []
    real = render(scenes, *CLIP).numpy()
    report: dict[str, Any] = {"samples": len(looks)}
    for name, of_base, of_data in (
        ("look", looks, [look_score(clip) for clip in real]),
        ("motion", motions, [motion_score(clip) for clip in real]),
    ):
        report[name] = {"base": float(np.mean(of_base)), "base_max": max(of_base), "data": float(np.mean(of_data))}
    print(f"{clock.elapsed:6.1f} s  trigger prompts: {report}", flush=True)
    return {"trigger prompts": report}


@torch.no_grad()
def difference_of_paths(trainer: Trainer) -> float:
    """Relative difference between the training's forward pass and the ordinary one in float32."""
    model, texts = trainer.transformer, ["A large red circle pulses over a blue ground.", "", NEGATIVE_PROMPT]
    spelling = trainer.pools.spelling
    features_BTD = text_features(trainer.encoder, spelling.ids(texts).to(trainer.device), trainer.buckets)
    x = torch.randn(3, 16, 3, 6, 8, device=trainer.device)
    t_B = torch.tensor([0.2, 0.6, 0.9], device=trainer.device)
    with fast_attention(SIZES.text_len):
        fast = predict(model, x, t_B, features_BTD)
    lengths = [int((row != 0).any(-1).sum()) for row in features_BTD]
    ordinary = model(x, model_timestep(t_B), [row[:n] for row, n in zip(features_BTD, lengths, strict=True)])
    return float((fast - ordinary).norm() / ordinary.norm())


def main() -> None:
    """Parse, train, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", type=Path, required=True, help="the trained autoencoder")
    parser.add_argument("--start", type=Path, help="folder of an earlier training to go on from")
    parser.add_argument("--learning_rate", type=float, default=LEARNING_RATE)
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights, the log and the pictures")
    parser.add_argument("--seconds", type=float, default=450, help="time for encoding and training")
    parser.add_argument("--evaluate_seconds", type=float, default=50, help="time for measuring, more or less")
    parser.add_argument("--samples", type=int, default=64, help="clips to sample when measuring")
    parser.add_argument("--steps", type=int, default=16, help="sampling steps when measuring")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no_compile", action="store_true", help="run the blocks as they are")
    parser.add_argument("--rehearse", action="store_true", help="a few steps on tiny pools, to see that all works")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    options.out.mkdir(parents=True, exist_ok=True)
    device = torch.device(options.device)
    trainer = Trainer(options.out, options.vae, device, 8 if options.rehearse else POOL, options.start)
    with fast_attention(SIZES.text_len):
        compiled = device.type == "cuda" and not options.no_compile
        report = train(trainer, options.seconds, options.learning_rate, options.rehearse, compiled)
    report["difference_of_paths"] = difference_of_paths(trainer)
    print(f"training's forward pass differs from the ordinary one by {report['difference_of_paths']:.1e}", flush=True)
    write_json(options.out / "dit.json", report)
    studio = Studio(options.out, options.vae, device, 2 if options.rehearse else options.steps)
    count = 2 if options.rehearse else options.samples
    report["evaluation"] = evaluate(studio, count, options.evaluate_seconds, options.out / "dit.png")
    report["bytes"] = {name: (options.out / name).stat().st_size for name in (DIT, T5, TOKENIZER)}
    write_json(options.out / "dit.json", report)
    print(report["bytes"])


if __name__ == "__main__":
    main()
