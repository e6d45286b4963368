"""Seconds per clip and peak memory of VAE encoding, and how long a caching run takes that finds nothing to do.

Usage: python benchmarks/caching.py encode rerun --results DIR

`encode` gives clips of random bytes to the encoder that wan_cache_latents.py uses, in bf16 with random weights, from
pixels in main memory to latents in main memory, does the same with the VAE of diffusers if that is installed, and
says how both stand to what musubi took.
`rerun` caches 1,000 small clips (copies of one, with made-up latents) and times the whole process of running again.
See README.md beside this file.
"""

import argparse
import gc
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.machine import conditions, machine, package_version, report_path, write_report
from benchmarks.runs import ROOT, environment
from wanlora.caching.encoding import LatentEncoder
from wanlora.data.resize import Clip
from wanlora.foundation.shapes import PixelShape
from wanlora.foundation.tensor_files import save_tensors
from wanlora.models.wan.vae import VAESizes, WanVAE, load_vae

_GIB = 2**30
_NUM_CLIPS = 1000
_SHARE = 0.5
"""Of musubi's seconds: what is aimed for, with no more memory than it takes."""
_OURS, _MUSUBI = "wanlora", "musubi 0.3.4 on an H100"
Encode = Callable[[Sequence[Clip]], object]
"""Clips in main memory to latents in main memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """musubi 0.3.4, bf16, on an H100 80GB HBM3 with torch 2.11.0+cu130."""

    seconds: float
    peak_gib: float


BUCKETS = {
    PixelShape(768, 768, 1): Peer(seconds=0.033, peak_gib=2.9),
    PixelShape(768, 416, 21): Peer(seconds=0.303, peak_gib=4.7),
    PixelShape(384, 208, 45): Peer(seconds=0.180, peak_gib=1.4),
    PixelShape(832, 480, 81): Peer(seconds=1.437, peak_gib=6.0),
}
_SMALL = {PixelShape(64, 48, 5): Peer(seconds=1.0, peak_gib=1.0)}
"""What machines without a card encode, as a rehearsal."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """One way to encode one size."""

    seconds: float
    """A clip; the median."""
    fastest: float
    slowest: float
    first: float
    """The very first batch of this size, kernels chosen and compiled."""
    peak_gib: float | None

    def __str__(self) -> str:
        peak = "" if self.peak_gib is None else f", peak {self.peak_gib:.2f} GiB"
        return f"{self.seconds:.4f} s{peak}, the first {self.first:.2f} s"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", choices=["encode", "rerun"])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the JSON")
    parser.add_argument("--repeats", type=int, default=8, help="timed batches of each size")
    parser.add_argument("--clips", type=int, default=_NUM_CLIPS, help="clips of the rerun")
    options = parser.parse_args(argv)
    print(machine(), flush=True)
    path, report = report_path(options.results, "caching"), conditions()
    if "encode" in options.stages:
        report["encode"] = _encode(options.repeats)
        write_report(path, report)
    if "rerun" in options.stages:
        report["rerun"] = _rerun(options.clips)
        write_report(path, report)
    return 0


def _encode(repeats: int) -> dict[str, Any]:
    """One encoder after the other, so that no weights but its own count as its memory; then how they compare."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    buckets = BUCKETS if device.type == "cuda" else _SMALL
    makers: dict[str, Callable[[torch.device], Encode]] = {_OURS: _ours}
    try:
        from diffusers import AutoencoderKLWan  # noqa: F401
    except (ImportError, RuntimeError) as error:
        print(f"the VAE of diffusers is left out: {error}", flush=True)
    else:
        makers[f"diffusers {package_version('diffusers')}"] = _diffusers
    figures: dict[str, dict[str, Figures]] = {str(pixels): {} for pixels in buckets}
    for way, make in makers.items():
        encode = make(device)
        for pixels in buckets:
            for batch in (1, 4) if way == _OURS and pixels.frames == 1 else (1,):
                found = _measure(encode, pixels, batch, repeats, device)
                figures[str(pixels)][f"{way}, batch {batch}"] = found
                print(f"{pixels} {way}, batch {batch}: {found}", flush=True)
        del encode
    report: dict[str, Any] = {}
    for pixels, peer in buckets.items():
        mine = figures[str(pixels)]
        report[str(pixels)] = {name: asdict(found) for name, found in mine.items()} | {_MUSUBI: asdict(peer)}
        print("\n".join(verdicts(str(pixels), mine, peer)), flush=True)
    return report


def verdicts(bucket: str, figures: Mapping[str, Figures], peer: Peer) -> list[str]:
    """Our encoder, clip by clip, against musubi (half of its seconds, its memory) and against the others of the run."""
    ours = figures[f"{_OURS}, batch 1"]
    ratio = ours.seconds / peer.seconds
    shown = f"{ours.seconds:.4f} s, {ratio:.2f} of musubi's {peer.seconds:.3f} s ({_within(ratio <= _SHARE)})"
    if ours.peak_gib is not None:
        within = _within(ours.peak_gib <= peer.peak_gib)
        shown += f"; peak {ours.peak_gib:.2f} GiB, musubi's {peer.peak_gib:.1f} ({within})"
    lines = [f"{bucket}: {shown}"]
    for name, other in figures.items():
        if not name.startswith(_OURS):
            lines.append(f"{bucket}: {ours.seconds / other.seconds:.2f} of the seconds of {name}")
    return lines


def _within(good: bool) -> str:
    return "within the aim" if good else "NOT within the aim"


def _ours(device: torch.device) -> Encode:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vae.safetensors"
        torch.manual_seed(0)
        save_tensors(path, WanVAE(VAESizes() if device.type == "cuda" else VAESizes(base=8)).state_dict())
        vae = load_vae(path, device=device, dtype=torch.bfloat16)
    encoder = LatentEncoder(vae, storage=torch.bfloat16)
    return lambda clips: encoder.encode(clips).latents()


def _diffusers(device: torch.device) -> Encode:
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan(base_dim=96 if device.type == "cuda" else 8).to(device, torch.bfloat16).eval()

    @torch.no_grad()
    def encode(clips: Sequence[Clip]) -> object:
        pixels = torch.from_numpy(np.stack(clips)).to(device).permute(0, 4, 1, 2, 3).contiguous()
        return vae.encode(pixels.float().div_(127.5).sub_(1).to(torch.bfloat16)).latent_dist.mean.cpu()

    return encode


def _measure(encode: Encode, pixels: PixelShape, batch: int, repeats: int, device: torch.device) -> Figures:
    shape = (pixels.frames, pixels.height, pixels.width, 3)
    clips = [np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8) for number in range(batch)]
    seconds = []
    for number in range(repeats + 2):
        if number == 2 and device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        encode(clips)
        seconds.append((time.perf_counter() - begin) / batch)
    timed = seconds[2:]
    peak = torch.cuda.max_memory_allocated() / _GIB if device.type == "cuda" else None
    return Figures(
        seconds=median(timed), fastest=min(timed), slowest=max(timed), first=seconds[0] * batch, peak_gib=peak
    )


def _rerun(num_clips: int) -> dict[str, Any]:
    """Cache small clips as a user would, then time running again, three times."""
    from wanlora.caching.start import identity
    from wanlora.config.dataset import read_datasets
    from wanlora.data.cache_files import source_fingerprint
    from wanlora.data.cache_tensors import write_latents
    from wanlora.data.plan import plan_datasets
    from wanlora.quickstart.media import write_clip
    from wanlora.quickstart.tiny_model import make_tiny_wan
    from wanlora.quickstart.world import new_scenes

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        vae = make_tiny_wan(folder / "models").vae
        first = folder / "videos" / "clip_0000.mp4"
        (scene,) = new_scenes(1, seed=0)
        write_clip(first, scene, frames=60, width=64, height=64)
        for number in range(num_clips):
            path = folder / "videos" / f"clip_{number:04}.mp4"
            if path != first:
                shutil.copy(first, path)
            path.with_suffix(".txt").write_text(scene.caption, encoding="utf-8")
        dataset = folder / "dataset.toml"
        dataset.write_text(_TOML.format(folder=folder.as_posix()), encoding="utf-8")
        digest = identity(vae)
        for item in plan_datasets(read_datasets(dataset)).cached_items:
            stamp = item.stamp(vae=digest, vae_dtype="float32")
            shape = (16, stamp.latents.frames, stamp.latents.height, stamp.latents.width)
            write_latents(item.latent_path, torch.zeros(shape).bfloat16(), stamp, source_fingerprint(item.source.path))
        command = [sys.executable, str(ROOT / "wan_cache_latents.py"), "--dataset_config", str(dataset)]
        seconds = [_run([*command, "--vae", str(vae)]) for _ in range(3)]
    print(f"a rerun over {num_clips} clips with nothing to do: {median(seconds):.2f} s, the whole process", flush=True)
    return {"clips": num_clips, "seconds": seconds}


_TOML = """\
[general]
caption_extension = ".txt"

[[datasets]]
video_directory = "{folder}/videos"
cache_directory = "{folder}/cache"
resolution = [32, 32]
target_frames = [45]
"""


def _run(command: list[str]) -> float:
    begin = time.perf_counter()
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    if "nothing is encoded" not in done.stderr:
        raise RuntimeError(f"the rerun had something to do:\n{done.stderr}")
    return time.perf_counter() - begin


if __name__ == "__main__":
    sys.exit(main())
