"""Everything that is trained, put together in the one order that works.

Load (merging adapters into each tensor, then quantising it), freeze, adapt, stream, compile, recompute. Merging has to
see weights before they are quantised; adapters have to wrap layers that are already quantised; streaming has to know
which tensors are trained and must not leave the device; compiling has to see the final modules; what may be kept
instead of recomputed depends on both.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from wanlora.config.train import MemoryConfig, NetworkConfig, TrainConfig
from wanlora.foundation.dtypes import dtype_name
from wanlora.foundation.errors import CheckpointError
from wanlora.foundation.laps import start
from wanlora.foundation.log import log, say_once, warn_once
from wanlora.foundation.meanwhile import importing
from wanlora.foundation.random import Streams
from wanlora.lora.drawing import drawing_downs
from wanlora.lora.files import read_lora
from wanlora.lora.merge import MergedLoRAs
from wanlora.lora.network import LoRANetwork, inject
from wanlora.lora.targets import candidates
from wanlora.memory.checkpointing import Recompute
from wanlora.memory.compile import (
    compile_blocks,
    does_without_compiler,
    importing_compiler,
    missing_compiler,
    missing_cpp_compiler,
)
from wanlora.memory.footprint import BlockMaths, attention_per_token
from wanlora.memory.keeping import Keeping
from wanlora.memory.limit import CardLimit
from wanlora.memory.measure import GIB, CudaMeter, is_out_of_memory
from wanlora.memory.placement import LeavingBlocks, streamed_indexes
from wanlora.memory.streaming import BlockStream
from wanlora.models.wan.checkpoint import Install, install_parameter, load_transformer
from wanlora.models.wan.transformer import WanTransformer
from wanlora.quantization.fast_linear import layers_by_input
from wanlora.quantization.installer import Fp8Installer, Mode
from wanlora.quantization.kept import KeptCopy
from wanlora.quantization.scaled_matmul import missing_fp8_maths
from wanlora.quantization.transposed import TransposedWeights
from wanlora.training.engine import compute_dtype
from wanlora.training.prepare import Prepared
from wanlora.training.trackers import tracker_module
from wanlora.training.warming import warming_up


@dataclass(frozen=True, kw_only=True, slots=True)
class Trainee:
    """The frozen model, its adapters, and the stream that brings blocks to the card, if there is one."""

    model: WanTransformer
    network: LoRANetwork
    stream: BlockStream | None
    recompute: Recompute
    keeping: Keeping
    """Decides how many blocks `recompute` lets off."""
    dtype: torch.dtype
    """Number format of the matrix products."""


def build_trainee(
    config: TrainConfig,
    prepared: Prepared,
    device: torch.device,
    streams: Streams,
    *,
    quiet: bool,
    card: CardLimit | None = None,
) -> Trainee:
    """Build what is trained. `quiet` hides the progress bar; `card` is what may be used of one."""
    dtype = compute_dtype(config.run.mixed_precision, prepared.transformer.dtypes[0], device)
    streamed = num_streamed(config.memory, device, prepared.transformer.sizes.num_layers)
    compiles = wants_compile(config.memory, device)
    leaving = LeavingBlocks(device, streamed_indexes(prepared.transformer.sizes.num_layers, streamed))
    recomputes = config.memory.gradient_checkpointing or streamed > 0 or config.memory.fp8_fast
    needed = compiles or prepared.optimizer.asks_compiler or not does_without_compiler(recomputes=recomputes)
    whole = compiles and config.memory.compile_backend == "inductor"
    generator = streams.generator("init")
    downs = drawing_downs(prepared.down_shapes, generator)
    logs = None if quiet else tracker_module(config.logging)
    imports = importing_compiler(whole=whole) if needed else importing(logs) if logs else nullcontext()
    with imports, warming_up(device, dtype, config.attention.training_kernel):
        model = _load(config, prepared, device, dtype, leaving, quiet)
        start.lap("weights")
        network = _adapt(config.network, prepared, model, device, generator, downs.result())
        start.lap("adapters")
    start.lap("compiler and libraries")
    stream = None
    if streamed or device.type == "cuda":  # where memory runs out, more blocks may be streamed than at first
        stream = BlockStream(
            list(model.blocks), streamed, device, config.memory.block_swap_ring_size, masters=leaving.masters
        )
        stream.attach()
    if compiles:
        _compile(config.memory, model, device)
    model.run_block = recompute = _runner(config.memory, model, stream)
    recompute.keep = keeping = choose_keeping(config.memory, recompute, device, card, _attention_bytes(model))
    model.train()
    start.lap("blocks")
    return Trainee(model=model, network=network, stream=stream, recompute=recompute, keeping=keeping, dtype=dtype)


def num_streamed(config: MemoryConfig, device: torch.device, num_blocks: int) -> int:
    """How many blocks are streamed on this device: those asked for and as many as the ring keeps on it."""
    wanted = config.num_swapped
    if wanted and device.type != "cuda":
        say_once(f"--blocks_to_swap {wanted}: without a CUDA card all weights are in system memory; nothing is swapped")
        return 0
    if wanted + config.block_swap_ring_size > num_blocks:
        say_once(
            f"--blocks_to_swap {wanted}: {config.block_swap_ring_size} blocks at a time are on the card while they are "
            f"copied and used, so the memory of {num_blocks - config.block_swap_ring_size} is freed"
        )
    return min(num_blocks, wanted + config.block_swap_ring_size) if wanted else 0


def wants_compile(config: MemoryConfig, device: torch.device) -> bool:
    """Whether blocks are compiled: as asked, otherwise on CUDA where a compiler exists."""
    if config.compile is False:
        return False
    if config.compile is None and device.type != "cuda":
        if config.compile_cpp_wrapper:
            say_once("--compile_cpp_wrapper changes nothing: on a CPU blocks are compiled only with --compile")
        return False
    missing = missing_compiler(device) if config.compile_backend == "inductor" else None
    if missing is not None:
        say_once(f"blocks are not compiled, which costs speed: {missing}")
        return False
    return True


def wants_cpp_wrapper(config: MemoryConfig, device: torch.device) -> bool:
    """Whether compiled blocks queue their kernels by C++: as asked, where such code can be compiled."""
    if not config.compile_cpp_wrapper or config.compile_backend != "inductor":
        return False
    missing = missing_cpp_compiler(device)
    if missing is not None:
        say_once(
            f"--compile_cpp_wrapper: {missing}; kernels are queued by Python, which takes the host about a third longer"
        )
    return missing is None


def fp8_weights(config: MemoryConfig, device: torch.device) -> Mode | None:
    """How the weights of the blocks are kept in fp8: as fp8 maths want them if they are asked for and possible."""
    if not config.fp8_fast:
        return config.fp8_mode
    missing = missing_fp8_maths(device)
    if missing is None:
        return "rows"
    warn_once(f"--fp8_fast: {missing}; weights are kept in fp8 and multiplied in the model's own number format")
    return config.fp8_mode


def keep_transposed(config: MemoryConfig, model: WanTransformer) -> TransposedWeights:
    """Transpose the weights of layers that multiply in fp8, if that was decided and the card has room after all.

    To be called when it is certain which layers those are.
    """
    made = TransposedWeights(layers_by_input(model))
    if config.fp8_fast_transposed != "on":
        return made
    try:
        made.keep()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        log.warning("the card has too little memory left for transposed weights; steps take a little longer without")
    return made


def _load(
    config: TrainConfig,
    prepared: Prepared,
    device: torch.device,
    dtype: torch.dtype,
    leaving: LeavingBlocks,
    quiet: bool,
) -> WanTransformer:
    """The frozen model: from the checkpoint, or from what an earlier start kept of it. Streamed blocks have left."""
    read = partial(
        load_transformer,
        task=config.model.task,
        device=device,
        dtype=dtype,
        residual_dtype=residual_dtype(config.memory),
        attention=config.attention.training_kernel,
        progress=not quiet,
    )
    mode = fp8_weights(config.memory, device)
    kept = _kept_copy(config, prepared, mode, dtype)
    model = _read_kept(kept, read, leaving, Fp8Installer(device, dtype, mode)) if kept and mode else None
    if model is None:
        fp8 = Fp8Installer(device, dtype, mode) if mode else None
        model = _read_checkpoint(config, read, leaving.after(fp8 or install_parameter))
        notes = fp8.summary() if fp8 else []
        for line in notes:
            log.info(line)
        if kept and not quiet:
            kept.write(model, notes)
    log.info(f"maths in {dtype_name(dtype)}, residual stream in {dtype_name(model.residual_dtype)}")
    return model


def _kept_copy(config: TrainConfig, prepared: Prepared, mode: Mode | None, dtype: torch.dtype) -> KeptCopy | None:
    """Where the quantised weights are kept, if they are."""
    folder, dit = config.memory.quantized_cache, config.model.dit
    if folder is None or mode is None:
        return None
    if prepared.transformer.dtypes[0].itemsize == 1:
        say_once(f"--quantized_cache: {dit} is in fp8 already and is read as it is")
        return None
    assert dit is not None
    return KeptCopy.of(folder, dit, mode=mode, dtype=dtype, merged=config.network.merged_weights)


def _read_kept(
    kept: KeptCopy, read: Callable[..., WanTransformer], leaving: LeavingBlocks, fp8: Fp8Installer
) -> WanTransformer | None:
    """The model as it was kept; None, with the reason in the log, if it has to be made anew."""
    difference = kept.difference()
    if difference is not None:
        log.info(f"--quantized_cache: {kept.path} {difference}; it is made when the model has been read")
        return None
    try:
        model = read(kept.path, install=leaving.after(fp8))
    except CheckpointError as error:
        leaving.forget()
        log.warning(f"the kept weights cannot be used and are made anew: {error}")
        return None
    log.info(f"the weights are those that an earlier start kept in {kept.path.parent}; what it said of them:")
    for line in kept.notes():
        log.info(f"  {line}")
    return model


def _read_checkpoint(config: TrainConfig, read: Callable[..., WanTransformer], install: Install) -> WanTransformer:
    merged = config.network.merged_weights
    adjust = MergedLoRAs([path for path, _ in merged], [factor for _, factor in merged]) if merged else None
    model = read(config.model.dit, adjust=adjust, install=install)
    if adjust:
        adjust.finish()
    return model


def residual_dtype(config: MemoryConfig) -> torch.dtype:
    """The residual stream's number format; `auto` is float32."""
    if config.residual_dtype == "bfloat16":
        say_once("the residual stream is kept in bfloat16: less memory, and the largest rounding error of the model")
        return torch.bfloat16
    return torch.float32


def _adapt(
    config: NetworkConfig,
    prepared: Prepared,
    model: WanTransformer,
    device: torch.device,
    generator: torch.Generator,
    downs: Mapping[str, Tensor],
) -> LoRANetwork:
    arguments = config.args
    network = inject(
        model,
        prepared.targets,
        rank=prepared.ranks or config.rank,
        alpha=prepared.alphas or config.network_alpha,
        generator=generator,
        downs=downs,
        dropout=config.network_dropout,
        rank_dropout=arguments.rank_dropout,
        module_dropout=arguments.module_dropout,
        device=device,
    )
    if config.network_weights is not None:
        network.load(read_lora(config.network_weights, candidates(model)), str(config.network_weights))
    log.info(f"LoRA on {len(network)} modules, {network.num_parameters / 1e6:.1f} million trained numbers")
    if arguments.verbose:
        for name, adapter in network.adapters.items():
            log.info(f"  {name}: {adapter.in_features} to {adapter.out_features}, rank {adapter.rank}")
    return network


def _runner(config: MemoryConfig, model: WanTransformer, stream: BlockStream | None) -> Recompute:
    made = Recompute(list(model.blocks), stream=stream, offload=config.gradient_checkpointing_cpu_offload)
    required = len(model.blocks) - len(made.optional)
    if required and not config.gradient_checkpointing:
        say_once(
            f"{required} streamed blocks are recomputed in backward: their weights have left the card by then "
            "(compiled blocks would not need that)"
        )
    return made


def _attention_bytes(model: WanTransformer) -> int:
    """What a block holds a token if it keeps the result of attention and nothing else beyond its input."""
    return attention_per_token(BlockMaths(sizes=model.sizes, compute=model.compute_dtype))


def activation_bytes(config: MemoryConfig) -> int | None:
    """What a step may need before blocks are recomputed, 0 for `off`; None: all that is left."""
    amount = config.activation_memory
    return {"auto": None, "off": 0}[amount] if isinstance(amount, str) else int(amount * GIB)


def choose_keeping(
    config: MemoryConfig, recompute: Recompute, device: torch.device, card: CardLimit | None, attention: int
) -> Keeping:
    """Which blocks are let off: those that fit, none, or without --gradient_checkpointing all while memory suffices."""
    num_optional, num_blocks = len(recompute.optional), len(recompute.blocks)
    everything = not config.gradient_checkpointing
    amount = config.activation_memory
    if card is None:
        if not everything and amount not in ("auto", "off"):
            say_once(f"--activation_memory {amount:g} has no effect on a CPU: every block is recomputed")
        return Keeping(num_optional, num_blocks, everything=everything)
    return Keeping(
        num_optional,
        num_blocks,
        meter=CudaMeter(device),
        limit=card.allocated,
        activations=activation_bytes(config),
        num_inputs=0 if recompute.offload else num_blocks,
        attention=attention if recompute.chooses else 0,
        everything=everything,
        ample=fp8_weights(config, device) != "rows",  # with fp8 maths what is read and written more takes that time
    )


def _compile(config: MemoryConfig, model: WanTransformer, device: torch.device) -> None:
    dynamic = {"true": True, "false": False, "auto": None}[config.compile_dynamic or "true"]
    compile_blocks(
        model.blocks,
        backend=config.compile_backend,
        mode=config.compile_mode,
        dynamic=dynamic,
        fullgraph=config.compile_fullgraph,
        cache_size_limit=config.compile_cache_size_limit,
        cpp_wrapper=wants_cpp_wrapper(config, device),
    )
