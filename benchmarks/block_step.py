"""Where the time of one transformer block goes: forward and backward, recomputed and kept, and its kernels by kind.

Usage: python benchmarks/block_step.py --geometry 14B --results DIR

One block of real sizes with random fp8 weights and an adapter on every linear, compiled as the trainer compiles it. A
block of a step costs what is measured here, so a step costs the number of blocks times that, and embeddings, head and
optimizer on top. Everything that a block saves for its backward is counted. See README.md beside this file.
"""

import argparse
import json
import platform
import re
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from benchmarks.materials import GEOMETRIES, TEXT_TOKENS, Bucket
from benchmarks.runs import ROOT
from wanlora.foundation.files import write_text
from wanlora.foundation.shapes import LatentShape
from wanlora.lora.layers import LoRALinear
from wanlora.memory.checkpointing import Recompute
from wanlora.memory.compile import compile_blocks
from wanlora.models.wan.blocks import WanBlock
from wanlora.models.wan.layers import text_rows
from wanlora.models.wan.rope import rope_table
from wanlora.models.wan.spec import WanSizes
from wanlora.quantization.fast_linear import FastFp8Linear, layers_by_input
from wanlora.quantization.linear import Fp8Linear
from wanlora.quantization.transposed import TransposedWeights

KINDS = ("matmul", "adapter", "attention", "dequantise", "pointwise", "copy", "other")
_PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::_scaled_mm"}
_ATTENTION = re.compile(r"attention|sdpa|flash|fmha|cudnn_generated", re.IGNORECASE)
_COPY = re.compile(r"memcpy|memset", re.IGNORECASE)
_PRODUCT_KERNEL = re.compile(r"gemm|nvjet|xmma|cutlass|splitk", re.IGNORECASE)
_GENERATED = re.compile(r"triton_|cpp_fused|elementwise|vectorized")
_DEQUANTISATION = re.compile(r"triton_poi_fused_(?:(?:_?to_copy|mul|view|_?unsafe_view|t|permute|unflatten)_?)+\d+")
_SHOWN = 45

Step = Callable[[], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One block at one size."""

    bucket: str
    tokens: int
    kept_ms: float
    """Forward and backward with everything kept."""
    attention_ms: float | None
    """With attention kept and the rest recomputed; None where blocks cannot do that."""
    recomputed_ms: float | None
    """Forward, forward again, backward; None if it was left out."""
    host_ms: float
    """What the host needs to queue the block that is kept: below this no card is faster."""
    saved_bytes: int
    """What is kept for backward beyond the block's own weights, its input included."""
    kinds_ms: dict[str, float]
    """Device time of the block that is kept by kind of kernel; empty where there is no card."""
    kernels: list[tuple[str, str, int, float]]
    """Kind, name, launches and milliseconds of the kernels that take longest."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every bucket of the geometry and write the results."""
    options = _parser().parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    geometry = GEOMETRIES[options.geometry]
    kind = None if options.bf16 else FastFp8Linear if options.fp8_fast else Fp8Linear
    block = make_block(geometry.sizes, device, rank=options.rank, kind=kind)
    if options.transposed:
        TransposedWeights(layers_by_input(block)).keep()
    inductor_config.coordinate_descent_tuning = options.tuned
    inductor_config.combo_kernels = options.combined
    inductor_config.cpp_wrapper = options.cpp_wrapper
    if not options.eager:
        compile_blocks([block], backend=compile_fx if options.compilers_choice else "inductor")
    dtype = torch.bfloat16 if options.residual == "bfloat16" else torch.float32
    measured = []
    for bucket in _chosen(geometry.buckets, options.buckets):
        arguments = make_arguments(geometry.sizes, LatentShape.of(bucket.pixels), device, dtype)
        name = str(bucket.pixels)
        measured.append(measure(block, arguments, name, options.repeats, options.rank, kept_only=options.kept_only))
        print(_line(measured[-1], geometry.sizes), flush=True)
    print("\n".join(_kernel_lines(measured[min(options.table, len(measured) - 1)])), flush=True)
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    path = options.results / f"block-step-{options.geometry}-{options.name or stamp}.json"
    write_text(
        path, json.dumps({**_conditions(options, device), "blocks": [asdict(one) for one in measured]}, indent=1)
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="14B", help="size of the block")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the JSON")
    parser.add_argument("--name", help="last part of the JSON's name; default: the time")
    parser.add_argument("--rank", type=int, default=32, help="rank of the adapters")
    parser.add_argument("--bf16", action="store_true", help="weights in bf16 instead of fp8")
    parser.add_argument("--fp8_fast", action="store_true", help="multiply in fp8 as well")
    parser.add_argument("--transposed", action="store_true", help="with --fp8_fast: keep the weights transposed, too")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--compilers_choice", action="store_true", help="the compiler chooses what is kept")
    parser.add_argument("--tuned", action="store_true", help="the compiler tries more shapes of its kernels")
    parser.add_argument("--cpp_wrapper", action="store_true", help="the compiler calls its kernels from C++")
    parser.add_argument("--combined", action="store_true", help="the compiler joins kernels that are independent")
    parser.add_argument("--residual", choices=("float32", "bfloat16"), default="float32", help="the residual stream")
    parser.add_argument("--kept_only", action="store_true", help="leave out blocks that are recomputed")
    parser.add_argument("--repeats", type=int, default=10, help="blocks in a row that are timed as one")
    parser.add_argument("--buckets", nargs="+", help="only these, by their names, such as 768x416x21")
    parser.add_argument("--table", type=int, default=1, help="number of the bucket whose kernels are printed, from 0")
    return parser


def _chosen(buckets: Sequence[Bucket], names: Sequence[str] | None) -> list[Bucket]:
    """The buckets of these names, all for None. Raises `SystemExit` for a name that no bucket has."""
    known = {str(bucket.pixels): bucket for bucket in buckets}
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise SystemExit(f"no bucket is called {unknown[0]}; known: {', '.join(known)}")
    return [known[name] for name in names or known]


def make_block(
    sizes: WanSizes, device: torch.device, *, rank: int, kind: type[Fp8Linear] | None = Fp8Linear
) -> WanBlock:
    """A block with random weights and an adapter on every linear, which is of `kind`; None: a plain one in bf16.

    Small weights keep signals small.
    """
    generator = torch.Generator(device).manual_seed(0)
    with torch.device(device):
        block = WanBlock(sizes, torch.bfloat16).requires_grad_(False)
    for name, linear in [*block.named_modules()]:
        if isinstance(linear, nn.Linear):
            linear.weight.data.normal_(std=0.02, generator=generator)
            base = kind.quantized(linear) if kind else linear
            adapter = LoRALinear(base, rank=rank, scale=1.0, generator=torch.Generator().manual_seed(1), device=device)
            adapter.lora_up.weight.data.normal_(std=0.02, generator=generator)
            block.set_submodule(name, adapter)
    return block


def make_arguments(
    sizes: WanSizes, latent: LatentShape, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """What a block is called with: the residual stream in `dtype`, time, text, rotary table. Batch 1."""
    generator = torch.Generator(device).manual_seed(2)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator)

    text_BTD = draw(1, text_rows(TEXT_TOKENS, sizes.text_len), sizes.dim).bfloat16()
    text_BTD[:, TEXT_TOKENS:] = text_BTD[:, -1:]
    x_BLD = draw(1, latent.num_tokens, sizes.dim).to(dtype).requires_grad_()
    return x_BLD, draw(1, 6, sizes.dim), text_BTD, rope_table(latent, sizes.head_dim, device)


def measure(
    block: WanBlock, arguments: tuple[Tensor, ...], bucket: str, repeats: int, rank: int, *, kept_only: bool = False
) -> Measured:
    """Time, count and profile one block."""
    x_BLD = arguments[0]
    grad_BLD = torch.randn_like(x_BLD)
    recompute = Recompute([block])

    def forget() -> None:
        block.zero_grad()
        x_BLD.grad = None  # it would be added to, which no step does

    def kept() -> None:
        forget()
        block(*arguments).backward(grad_BLD)

    def attention_kept() -> None:
        forget()
        block(*arguments, save="attention").backward(grad_BLD)

    def recomputed() -> None:
        forget()
        recompute(block, *arguments).backward(grad_BLD)

    kept_ms = milliseconds(kept, x_BLD.device, repeats)
    halves = recompute.chooses and not kept_only
    attention_ms = milliseconds(attention_kept, x_BLD.device, repeats) if halves else None
    recomputed_ms = None if kept_only else milliseconds(recomputed, x_BLD.device, repeats)
    kernels = device_kernels(kept, rank) if x_BLD.is_cuda else []
    kinds: dict[str, float] = dict.fromkeys(KINDS, 0.0) if kernels else {}
    for kind, _, _, taken in kernels:
        kinds[kind] += taken
    return Measured(
        bucket=bucket,
        tokens=x_BLD.shape[1],
        kept_ms=kept_ms,
        attention_ms=attention_ms,
        recomputed_ms=recomputed_ms,
        host_ms=host_milliseconds(kept, x_BLD.device),
        saved_bytes=saved_bytes(block, arguments),
        kinds_ms=kinds,
        kernels=kernels[:_SHOWN],
    )


def milliseconds(step: Step, device: torch.device, repeats: int) -> float:
    """Time of one step when `repeats` of them are queued in a row: the best of three rows."""
    for _ in range(2):
        step()
    taken = []
    for _ in range(3):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(repeats):
                step()
            end.record()
            end.synchronize()
            taken.append(begin.elapsed_time(end) / repeats)
        else:
            start = time.perf_counter()
            for _ in range(repeats):
                step()
            taken.append((time.perf_counter() - start) * 1000 / repeats)
    return min(taken)


def host_milliseconds(step: Step, device: torch.device, repeats: int = 5) -> float:
    """Time until one step is queued, the card being idle: the best of a few."""
    taken = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        taken.append((time.perf_counter() - start) * 1000)
    return min(taken)


def saved_bytes(block: WanBlock, arguments: tuple[Tensor, ...]) -> int:
    """Bytes that autograd keeps of one call: distinct memory, parameters and shared arguments left out."""
    there = {_address(tensor) for tensor in (*block.parameters(), *block.buffers(), *arguments[1:])}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[_address(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        block(*arguments)
        saved[_address(arguments[0])] = arguments[0].untyped_storage().nbytes()
        return sum(size for address, size in saved.items() if address not in there)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def device_kernels(step: Step, rank: int, rounds: int = 3) -> list[tuple[str, str, int, float]]:
    """Kind, name, launches and milliseconds of every kernel of a step, the longest first."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], record_shapes=True) as profiler:
        for _ in range(rounds):
            step()
        torch.cuda.synchronize()
    events = profiler.events() or []
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    products: set[str] = set()
    total: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            total[event.name].append(event.time_range.elapsed_us())
        for kernel in event.kernels if event.name in _PRODUCTS else ():
            name = f"{event.name} {event.input_shapes[:3]} {kernel.name}"
            found[_product_kind(event, rank), name].append(kernel.duration)
            products.add(kernel.name)
    for name, durations in total.items():
        if name not in products:
            found[_kernel_kind(name), name].extend(durations)
    rows = [
        (kind, name, round(len(taken) / rounds), sum(taken) / rounds / 1000) for (kind, name), taken in found.items()
    ]
    return sorted(rows, key=lambda row: -row[3])


def _product_kind(event: FunctionEvent, rank: int) -> str:
    """An adapter's factor has the rank (or a few of them side by side) as one of its sizes."""
    shapes: Any = event.input_shapes[:3]
    sizes = {size for shape in shapes for size in shape}
    return "adapter" if any(0 < size <= 3 * rank and size % rank == 0 for size in sizes) else "matmul"


def _kernel_kind(name: str) -> str:
    if _COPY.search(name):
        return "copy"
    if _ATTENTION.search(name) and not name.startswith("triton_"):  # generated: only called after what it feeds
        return "attention"
    if _GENERATED.search(name):
        return "dequantise" if _is_dequantisation(name) else "pointwise"
    return "matmul" if _PRODUCT_KERNEL.search(name) else "other"


def _is_dequantisation(name: str) -> bool:
    """Generated kernels are named after the operations in them; dequantising is a cast and a product on a view."""
    return _DEQUANTISATION.fullmatch(name) is not None


def _line(one: Measured, sizes: WanSizes) -> str:
    shares = ", ".join(f"{kind} {taken:.2f}" for kind, taken in one.kinds_ms.items())
    per_token = one.saved_bytes / one.tokens
    attention = "" if one.attention_ms is None else f"attention kept {one.attention_ms:.3f} ms, "
    recomputed = "" if one.recomputed_ms is None else f"recomputed {one.recomputed_ms:.3f} ms, "
    return (
        f"{one.bucket} ({one.tokens} tokens): kept {one.kept_ms:.3f} ms, {attention}{recomputed}"
        f"host {one.host_ms:.3f} ms, {sizes.num_layers} blocks {one.kept_ms * sizes.num_layers / 1000:.3f} s, "
        f"saved {per_token / 1024:.1f} KiB a token; {shares}"
    )


def _kernel_lines(one: Measured) -> list[str]:
    whole = sum(one.kinds_ms.values())
    head = f"\n{one.bucket}, kept: {whole:.3f} ms in kernels"
    rows = [f"{taken:8.3f} ms {number:4d} x {kind:10s} {name[:150]}" for kind, name, number, taken in one.kernels]
    return [head, *rows]


def _conditions(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU",
        "torch": torch.__version__,
        "geometry": options.geometry,
        "rank": options.rank,
        "weights": "bfloat16" if options.bf16 else "fp8",
        "fp8_maths": options.fp8_fast,
        "transposed": options.transposed,
        "compiled": not options.eager,
        "compilers_choice": options.compilers_choice,
        "tuned": options.tuned,
        "combined": options.combined,
        "cpp_wrapper": options.cpp_wrapper,
        "residual": options.residual,
        "text_tokens": TEXT_TOKENS,
    }


if __name__ == "__main__":
    raise SystemExit(main())
