"""Trains the tiny Wan's autoencoder: the 2.1 architecture at base width 8, on clips made by code.

Usage: python -m benchmarks.tiny_wan.train_vae --out DIR [--seconds 430] [--rehearse]

Of the clips three quarters show the small world, its unseen look and motion included; the others random shapes,
colours and textures, because the autoencoder has to know everything. While training, latents are normalised per channel
and get noise, so that all channels are used and small errors of the transformer do not show. At the end the
normalisation is folded into the weights, so that latents have the statistics of the released autoencoder, which every
loader expects.
"""

import argparse
import platform
import random
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from benchmarks.tiny_wan.common import Average, Clock, contact_sheet, in_bf16, learning_rate
from benchmarks.tiny_wan.steps import Steps, Way, fastest
from wanlora.foundation.files import write_json
from wanlora.foundation.tensor_files import save_tensors
from wanlora.models.wan.vae import VAE_MEAN, VAE_STD, VAESizes, WanVAE, load_vae
from wanlora.models.wan.vae_layers import ChunkCache
from wanlora.quickstart.world import SHAPES, Drawing, base_scenes, draw, new_scenes, render

NAME = "wan_tiny_vae.safetensors"
SIZES = VAESizes(base=8, z=16)
BATCHES = (  # clips, frames, width, height, share of the steps
    (64, 1, 96, 96, 2),
    (64, 1, 112, 80, 1),
    (20, 9, 96, 64, 2),
    (12, 21, 64, 96, 1),
    (12, 21, 96, 64, 5),
    (12, 45, 64, 48, 5),
)
HELD_OUT = ((1, 96, 96), (1, 112, 80), (9, 96, 64), (21, 96, 64), (45, 64, 48))
NOISE = 0.08
LEARNING_RATE = 2.5e-3


class TrainedVAE(nn.Module):
    """The autoencoder with a normalisation between its halves that follows the data at first and is fixed later."""

    def __init__(self) -> None:
        super().__init__()
        self.vae = WanVAE(SIZES).requires_grad_(True)
        self.register_buffer("mean", torch.zeros(SIZES.z))
        self.register_buffer("std", torch.ones(SIZES.z))
        self.following = True
        initialise(self.vae)

    def forward(self, x_BCFHW: Tensor) -> Tensor:
        """Reconstruction of clips in [-1, 1]."""
        z = encode(self.vae, x_BCFHW).float()
        if self.following:
            flat = rearrange(z, "b c f h w -> c (b f h w)")
            mean, std = flat.mean(1), flat.std(1) + 1e-4
            self.mean.lerp_(mean.detach(), 0.02)
            self.std.lerp_(std.detach(), 0.02)
        else:
            mean, std = self.mean, self.std
        z = (z - _spread(mean)) / _spread(std)
        return decode(self.vae, z + NOISE * torch.randn_like(z))


def _spread(values_C: Tensor) -> Tensor:
    return rearrange(values_C, "c -> 1 c 1 1 1")


def initialise(vae: WanVAE) -> None:
    """Weights that keep the size of signals; residual branches start at zero."""
    for name, layer in vae.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Conv3d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
            if name.endswith(("residual.6", "proj")):
                layer.weight.data.mul_(0.1)


def encode(vae: WanVAE, x_BCFHW: Tensor) -> Tensor:
    """Mean latents before normalisation, with gradients: the first frame, then all others at once."""
    cache, parts = ChunkCache(), []
    for frames, first, last in _halves(x_BCFHW.shape[2], 1):
        cache.begin(first=first, last=last)
        parts.append(vae.conv1(vae.encoder(x_BCFHW[:, :, frames], cache)).chunk(2, dim=1)[0])
    return torch.cat(parts, dim=2)


def decode(vae: WanVAE, z_BCFHW: Tensor) -> Tensor:
    """Pixels, with gradients."""
    cache, parts = ChunkCache(), []
    for frames, first, last in _halves(z_BCFHW.shape[2], 1):
        cache.begin(first=first, last=last)
        parts.append(vae.decoder(vae.conv2(z_BCFHW[:, :, frames]), cache))
    return torch.cat(parts, dim=2)


def _halves(length: int, first: int) -> list[tuple[slice, bool, bool]]:
    if length == first:
        return [(slice(0, first), True, True)]
    return [(slice(0, first), True, False), (slice(first, length), False, True)]


class Clips:
    """Endless random clips, drawn where they are needed."""

    def __init__(self, device: torch.device, seed: int, count: int) -> None:
        self.device = device
        self.random = torch.Generator(device).manual_seed(seed)
        self.world = Drawing.of((*base_scenes(count, seed), *new_scenes(count, seed + 1)), device)

    def batch(self, clips: int, frames: int, width: int, height: int) -> Tensor:
        """Clips [B, 3, frames, height, width] in [-1, 1]."""
        num_world = clips * 3 // 4
        world = draw(self._of_world(num_world), frames, width, height)
        other = draw(self._anything(clips - num_world, width, height), frames, width, height)
        once_more = self._anything(clips - num_world, width, height)
        twice = draw(replace(once_more, ground=other), frames, width, height)
        other = torch.where(self._uniform(clips - num_world, 1, 1, 1, 1) < 0.4, twice, other)
        pixels = rearrange(torch.cat((world, other)), "b f h w c -> b c f h w")
        return pixels.mul(2).sub(1).contiguous()

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.random, device=self.device)

    def _of_world(self, count: int) -> Drawing:
        rows = (self._uniform(count) * len(self.world.radius)).long()
        picked = {name: getattr(self.world, name)[rows] for name in Drawing.__slots__}
        picked["start"] = torch.where(
            picked["sway"].any(dim=-1, keepdim=True), picked["start"], self._uniform(count, 2)
        )
        return Drawing(**picked | {"phase": self._uniform(count)})

    def _anything(self, count: int, width: int, height: int) -> Drawing:
        moving = (self._uniform(count, 1) < 0.5) * (self._uniform(count, 2) * 2 - 1)
        return Drawing(
            shape=(self._uniform(count) * len(SHAPES)).long(),
            fill=self._colours(count),
            ground=self._grounds(count, width, height),
            ink=self._colours(count) * (self._uniform(count, 1) < 0.5),
            outline=0.08 * self._uniform(count) * (self._uniform(count) < 0.5),
            radius=0.06 + 0.26 * self._uniform(count),
            start=self._uniform(count, 2),
            velocity=moving,
            sway=(0.3 * self._uniform(count) * (self._uniform(count) < 0.4))[:, None].expand(count, 2),
            pulse=0.5 * self._uniform(count) * (self._uniform(count) < 0.3),
            phase=self._uniform(count),
        )

    def _colours(self, count: int) -> Tensor:
        """Uniform; a third of them pushed to the corners of the cube."""
        colours = self._uniform(count, 3)
        return torch.where(self._uniform(count, 1) < 0.33, (colours > 0.5) * 0.94 + 0.03, colours)

    def _grounds(self, count: int, width: int, height: int) -> Tensor:
        """Plain, shaded, striped or cloudy, [B, 1, H, W, 3]."""
        one, two = (rearrange(self._colours(count), "b c -> b 1 1 1 c") for _ in range(2))
        side = min(width, height)
        x = torch.arange(width, device=self.device) / side
        y = torch.arange(height, device=self.device) / side
        angle, rate, phase, kind = (rearrange(self._uniform(count), "b -> b 1 1 1") for _ in range(4))
        angle = angle * 6.2832
        along = x * angle.cos() + rearrange(y, "h -> h 1") * angle.sin()
        shaded = (along * (0.3 + rate) + phase).clamp(0, 1)
        striped = (torch.sin((along * (1 + 4 * rate) + phase) * 6.2832) * 4 + 0.5).clamp(0, 1)
        noise = self._uniform(count, 1, 5, 5)
        cloudy = F.interpolate(noise, size=(height, width), mode="bicubic").clamp(0, 1)
        plain = torch.zeros_like(striped)
        mix = torch.where(kind < 0.85, striped, cloudy)
        mix = torch.where(kind < 0.45, plain, torch.where(kind < 0.65, shaded, mix))
        return torch.lerp(one, two, mix.unsqueeze(-1))


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """Absolute and squared differences of pixels, of edges, and of pictures made smaller."""
    output, target = (rearrange(x, "b c f h w -> (b f) c h w") for x in (output.float(), target))
    difference = output - target
    loss = difference.abs().mean() + 2 * difference.square().mean()
    loss = loss + 0.5 * (difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean())
    for size in (2, 4):
        loss = loss + 0.5 * F.avg_pool2d(difference, size).abs().mean()
    return loss


def folded(trained: TrainedVAE, latent_mean: Tensor, latent_std: Tensor) -> dict[str, Tensor]:
    """Official weights whose latents have the released mean and deviation per channel.

    A latent z of the trained encoder becomes a z + b; the decoder's first layer undoes that and applies the training's
    normalisation.
    """
    vae = deepcopy(trained.vae).double().cpu()
    a = torch.tensor(VAE_STD).double() / latent_std.double().cpu()
    b = torch.tensor(VAE_MEAN).double() - latent_mean.double().cpu() * a
    z, mean, std = SIZES.z, trained.mean.double().cpu(), trained.std.double().cpu()
    with torch.no_grad():
        assert vae.conv1.bias is not None and vae.conv2.bias is not None
        vae.conv1.weight[:z].mul_(rearrange(a, "c -> c 1 1 1 1"))
        vae.conv1.bias[:z].mul_(a).add_(b)
        vae.conv1.weight[z:].zero_()  # the variance, which nobody reads
        vae.conv1.bias[z:].fill_(-8.0)
        w = vae.conv2.weight
        vae.conv2.bias.sub_(w[:, :, 0, 0, 0] @ ((b / a + mean) / std))
        w.div_(rearrange(a * std, "c -> 1 c 1 1 1"))
    return in_bf16(vae.state_dict())


@torch.no_grad()
def latent_statistics(trained: TrainedVAE, device: torch.device, count: int) -> tuple[Tensor, Tensor]:
    """Mean and deviation of every channel over scenes of the world, each size counting alike."""
    sums, squares, sizes = torch.zeros(SIZES.z), torch.zeros(SIZES.z), 0
    for frames, width, height in HELD_OUT:
        scenes = (*base_scenes(count, 11), *new_scenes(count, 12))
        pixels = rearrange(render(scenes, frames, width, height, device=device), "b f h w c -> b c f h w")
        flat = rearrange(encode(trained.vae, pixels.float() / 127.5 - 1), "b c f h w -> c (b f h w)").cpu().float()
        sums, squares, sizes = sums + flat.mean(1), squares + flat.square().mean(1), sizes + 1
    mean = sums / sizes
    return mean, (squares / sizes - mean.square()).clamp_min(1e-8).sqrt()


def export(trained: TrainedVAE, average: Average, path: Path, device: torch.device, count: int) -> None:
    """Write the averaged weights as an official file."""
    average.swap()
    mean, std = latent_statistics(trained, device, count)
    save_tensors(path, folded(trained, mean, std), {"format": "pt"})
    average.swap()


@torch.no_grad()
def evaluate(path: Path, device: torch.device, count: int, sheet: Path) -> dict[str, Any]:
    """Signal to noise and statistics of latents of held-out scenes, through the ordinary loader in float32."""
    vae = load_vae(path, device=device, dtype=torch.float32)
    rows: list[Any] = []
    report: dict[str, Any] = {}
    for frames, width, height in HELD_OUT:
        for kind, scenes in (("base", base_scenes(count, 21)), ("new", new_scenes(count, 22))):
            target = render(scenes, frames, width, height, device=device)
            latents = vae.encode(rearrange(target, "b f h w c -> b c f h w").float() / 127.5 - 1, chunk=frames)
            shown = vae.decode(latents, chunk=frames).add(1).mul(127.5).round()
            shown = rearrange(shown, "b c f h w -> b f h w c")
            error = (shown - target.float()).square().mean(dim=(1, 2, 3, 4))
            flat = rearrange(latents, "b c f h w -> c (b f h w)")
            psnr = 10 * torch.log10(255**2 / error)
            report[f"{frames}x{width}x{height} {kind}"] = {
                "psnr_mean": psnr.mean().item(),
                "psnr_min": psnr.min().item(),
                "latent_mean_abs": flat.mean(1).abs().max().item(),
                "latent_std": [flat.std(1).min().item(), flat.std(1).max().item()],
            }
            rows += [[target[i].cpu().numpy(), shown[i].to(torch.uint8).cpu().numpy()] for i in range(2)]
    contact_sheet(sheet, rows, enlarge=1)
    return report


def table(report: Mapping[str, Mapping[str, Any]]) -> str:
    """The evaluation as text."""
    lines = [f"{'clips':20} {'PSNR mean':>10} {'min':>7} {'max |mean|':>11} {'std':>14}"]
    for name, row in report.items():
        low, high = row["latent_std"]
        lines.append(
            f"{name:20} {row['psnr_mean']:10.1f} {row['psnr_min']:7.1f} {row['latent_mean_abs']:11.2f} "
            f"{low:7.2f}{high:7.2f}"
        )
    return "\n".join(lines)


def resume(trained: TrainedVAE, start: Path) -> None:
    """Go on from an exported file; its statistics are those of the released autoencoder, and stay."""
    mean, std, layer = torch.tensor(VAE_MEAN), torch.tensor(VAE_STD), trained.vae.conv2
    trained.vae.load_state_dict(load_vae(start, device="cpu").state_dict())
    trained.mean.copy_(mean)
    trained.std.copy_(std)
    trained.following = False
    with torch.no_grad():  # the file's decoder takes latents as they were before the normalisation
        assert layer.bias is not None
        layer.bias.add_(layer.weight[:, :, 0, 0, 0] @ mean)
        layer.weight.mul_(rearrange(std, "c -> 1 c 1 1 1"))


def train(out: Path, seconds: float, device: torch.device, rehearse: bool, start: Path | None, peak: float) -> None:
    """Train until the time is up, then export and measure."""
    clock = Clock(seconds)
    torch.manual_seed(0)
    trained = TrainedVAE()
    if start is not None:
        resume(trained, start)
    trained.to(device)
    clips = Clips(device, seed=1 if start is None else 101, count=8 if rehearse else 4096)
    count = sum(p.numel() for p in trained.parameters())
    print(f"{count / 1e6:.2f} M parameters on {device}", flush=True)
    batches = [(2, *shape[1:4]) for shape in BATCHES] if rehearse else [shape[:4] for shape in BATCHES]
    way = fastest(trained, reconstruction_loss, clips.batch(*batches[-2])) if device.type == "cuda" else Way()
    step_of = Steps(trained, reconstruction_loss, way, device)
    optimizer = torch.optim.AdamW(
        step_of.parameters, lr=peak, betas=(0.9, 0.99), weight_decay=1e-3, fused=device.type == "cuda"
    )
    average = Average([trained], 0.999)
    order = random.Random(2)
    history, running, skipped, step, saved = [], torch.zeros((), device=device), 0, 0, clock.elapsed
    x_BCFHW = clips.batch(*batches[0])
    while clock.share < 1 and not (rehearse and step >= 6):
        trained.following = start is None and clock.share < 0.6 and not (rehearse and step >= 3)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(peak, step, clock.share)
        loss = step_of(x_BCFHW, trained.following)
        x_BCFHW = clips.batch(*order.choices(batches, [shape[4] for shape in BATCHES])[0])
        norm = nn.utils.clip_grad_norm_(step_of.parameters, 1.0)
        if not bool(norm.isfinite()):
            skipped += 1
        else:
            optimizer.step()
            average.update()
            running = running.lerp(loss, 0.02 if step else 1.0)
        step += 1
        if step % 100 == 0 or step == 1:
            history.append({"step": step, "seconds": round(clock.elapsed, 1), "loss": running.item()})
            print(f"{clock.elapsed:6.1f} s  step {step}  loss {running.item():.4f}  skipped {skipped}", flush=True)
        if clock.elapsed - saved > 60:
            export(trained, average, out / f"checkpoint_{NAME}", device, 32)
            saved = clock.elapsed
    export(trained, average, out / NAME, device, 2 if rehearse else 128)
    report = evaluate(out / NAME, device, 2 if rehearse else 64, out / "vae.png")
    print(table(report), flush=True)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    size = (out / NAME).stat().st_size
    print(f"{size / 1e6:.2f} MB, {step} steps in {clock.elapsed:.0f} s on {machine}, {way}")
    settings: dict[str, Any] = {"parameters": count, "bytes": size, "steps": step, "skipped": skipped}
    settings |= {"seconds": seconds, "device": machine, "torch": torch.__version__, "way": str(way), "noise": NOISE}
    settings |= {"learning_rate": peak, "started_from_file": start is not None}
    write_json(out / "vae.json", {"settings": settings, "evaluation": report, "training": history})


def main() -> None:
    """Parse and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights, the log and the pictures")
    parser.add_argument("--seconds", type=float, default=430, help="time for training; measuring comes after it")
    parser.add_argument("--start", type=Path, help="an exported autoencoder to go on from")
    parser.add_argument("--learning_rate", type=float, default=LEARNING_RATE, help="its highest value")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rehearse", action="store_true", help="a few steps on tiny batches, to see that all works")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    options.out.mkdir(parents=True, exist_ok=True)
    train(
        options.out,
        options.seconds,
        torch.device(options.device),
        options.rehearse,
        options.start,
        options.learning_rate,
    )


if __name__ == "__main__":
    main()
