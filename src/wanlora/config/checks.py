"""Flags that do not go together: missing ones, contradictions, and those that change nothing.

What cannot be is a problem; what merely has no effect, or was decided by a default that differs from musubi's, is said.
`given` are the names of the flags that the user gave.
"""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from wanlora.config.caching import LatentCacheConfig, TextCacheConfig
from wanlora.config.fields import groups_of, settings_of
from wanlora.config.train import TrainConfig
from wanlora.config.values import read_key_values, read_network_args
from wanlora.foundation.errors import Problems, did_you_mean
from wanlora.foundation.files import is_portable_name
from wanlora.foundation.log import say_once

Given = Collection[str]

_REQUIRED = {
    "dataset_config": "the dataset TOML, for example --dataset_config style.toml",
    "dit": "the Wan model, for example --dit wan2.1_t2v_14B_bf16.safetensors",
    "output_dir": "the folder for the LoRA, for example --output_dir output",
    "output_name": "the name of the LoRA, for example --output_name style_v01",
    "network_module": "type --network_module networks.lora_wan",
    "vae": "the Wan VAE, for example --vae wan_2.1_vae.safetensors",
    "t5": "the text encoder, for example --t5 models_t5_umt5-xxl-enc-bf16.pth",
}
_WEIGHTING_OPTIONS = {"logit_mean": "logit_normal", "logit_std": "logit_normal", "mode_scale": "mode"}
"""Timestep options that sigma reads only with one weighting_scheme."""
_SCHEDULER_OPTIONS = {
    "lr_scheduler_num_cycles": ("cosine_with_restarts", "cosine_with_min_lr", "warmup_stable_decay"),
    "lr_scheduler_power": ("polynomial",),
    "lr_scheduler_timescale": ("inverse_sqrt",),
    "lr_scheduler_min_lr_ratio": ("cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay", "rex"),
    "lr_decay_steps": ("warmup_stable_decay",),
}
"""Schedule options, and the schedules that read them."""
_LARGEST_RANK = 5120
"""Width of the 14B models: an update of this rank can be any matrix."""


def check_latent_cache(config: LatentCacheConfig, given: Given, problems: Problems) -> None:
    """Flags of wan_cache_latents.py."""
    _require(config, ("dataset_config",), given, problems)
    if config.debug_mode is None:
        _without_effect(given, ("console_width", "console_num_images"), "without --debug_mode")
        if not config.dry_run:
            _require(config, ("vae",), given, problems)


def check_text_cache(config: TextCacheConfig, given: Given, problems: Problems) -> None:
    """Flags of wan_cache_text_encoder_outputs.py."""
    _require(config, ("dataset_config",) if config.dry_run else ("dataset_config", "t5"), given, problems)
    _without_effect(given, ("num_workers",), "for captions, which are read at once")


def check_train(config: TrainConfig, given: Given, problems: Problems) -> None:
    """Flags of wan_train_network.py."""
    if config.run.show_timesteps is None:
        _require(config.model, ("dit",), given, problems)
        _require(config.run, ("dataset_config",), given, problems)
        _require(config.network, ("network_module",), given, problems)
        for check in (_attention, _optimizer):
            check(config, given, problems)
    if config.run.show_timesteps != "console":
        _require(config.saving, ("output_dir", "output_name"), given, problems)
    for check in (_run, _schedule, _timesteps, _network, _saving, _previews, _logging, _memory):
        check(config, given, problems)


def check_paths(config: Any) -> None:
    """Every file that the config names exists. Raises `ConfigError` listing those that do not."""
    problems = Problems()
    for name, path in _input_paths(config):
        if not path.exists():
            problems.add(f"--{name}: there is no {path}{_about_missing(path)}")
    problems.raise_all()


def _about_missing(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; its folder {path.parent} does not exist either"
    return did_you_mean(path.name, [file.name for file in path.parent.iterdir()]) or "; check the spelling"


def _input_paths(config: Any) -> Iterator[tuple[str, Path]]:
    groups = [getattr(config, name) for name in groups_of(type(config))]
    for group in groups or [config]:
        for setting in settings_of(type(group)):
            value = getattr(group, setting.name)
            if setting.kind.input_path and value is not None:
                yield from ((setting.name, path) for path in (value if setting.kind.many else (value,)))


def _require(config: Any, names: tuple[str, ...], given: Given, problems: Problems) -> None:
    for name in names:
        if not getattr(config, name) and name not in given:
            problems.add(f"--{name} is missing: {_REQUIRED[name]}")


def _without_effect(given: Given, names: Collection[str], when: str) -> None:
    for name in names:
        if name in given:
            say_once(f"--{name} changes nothing {when}")


def _run(config: TrainConfig, given: Given, problems: Problems) -> None:
    run = config.run
    if run.persistent_data_loader_workers and run.max_data_loader_n_workers == 0:
        problems.add("--persistent_data_loader_workers needs --max_data_loader_n_workers of at least 1")
    if run.max_train_epochs is not None:
        _without_effect(given, ("max_train_steps",), "with --max_train_epochs, which decides the length")
    options = ("ddp_gradient_as_bucket_view", "ddp_static_graph")
    _without_effect(given, options, "here: processes exchange only the adapters' gradients, without DDP")


def _attention(config: TrainConfig, given: Given, problems: Problems) -> None:
    attention = config.attention
    named = [name for name in ("sdpa", "flash_attn", "xformers", "flash3") if getattr(attention, name)]
    if not named:
        say_once("no attention kernel is named: --sdpa is used")
    elif len(named) > 1:
        also = ", ".join(f"--{name}" for name in named)
        say_once(f"{also} name several attention kernels: --{named[0]} is used")
    _without_effect(given, ("split_attn",), "here: no batch needs a mask, so none has to be split")
    if attention.sage_attn:
        say_once("--sage_attn serves previews only, because it has no backward pass")


def _optimizer(config: TrainConfig, given: Given, problems: Problems) -> None:
    if "optimizer_type" not in given:
        say_once(f"no --optimizer_type is given: {config.optimizer.optimizer_type} is used")
    if "learning_rate" not in given and config.optimizer.optimizer_type.lower() != "adafactor":
        rate = config.optimizer.learning_rate
        say_once(f"no --learning_rate is given: {rate:g} is used, musubi's default; for a LoRA 5e-5 to 1e-4 is usual")
    if config.optimizer.learning_rate == 0 and config.optimizer.optimizer_type.lower() != "adafactor":
        say_once("--learning_rate 0: nothing is learned; the LoRA stays as it begins")
    read_key_values(config.optimizer.optimizer_args, "--optimizer_args", problems)


def _schedule(config: TrainConfig, given: Given, problems: Problems) -> None:
    schedule = config.schedule
    read_key_values(schedule.lr_scheduler_args, "--lr_scheduler_args", problems)
    if schedule.lr_scheduler_type is not None:
        options = ("lr_scheduler", "lr_warmup_steps", *_SCHEDULER_OPTIONS)
        _without_effect(given, options, "with --lr_scheduler_type, which gets --lr_scheduler_args only")
        return
    if schedule.lr_scheduler == "constant" and schedule.lr_warmup_steps:
        problems.add(
            "--lr_warmup_steps has no meaning for --lr_scheduler constant: type --lr_scheduler constant_with_warmup, "
            "or remove the warmup"
        )
    for name, schedulers in _SCHEDULER_OPTIONS.items():
        if schedule.lr_scheduler not in schedulers:
            _without_effect(given, (name,), f"with --lr_scheduler {schedule.lr_scheduler}")
    if schedule.lr_scheduler == "piecewise_constant":
        _without_effect(given, ("lr_warmup_steps",), "with --lr_scheduler piecewise_constant")


def _timesteps(config: TrainConfig, given: Given, problems: Problems) -> None:
    timesteps = config.timesteps
    if timesteps.timestep_sampling == "sigma":
        for name, scheme in _WEIGHTING_OPTIONS.items():
            if timesteps.weighting_scheme != scheme:
                _without_effect(given, (name,), f"with --weighting_scheme {timesteps.weighting_scheme}")
    if timesteps.min_timestep is None and timesteps.max_timestep is None:
        _without_effect(given, ("preserve_distribution_shape",), "without --min_timestep or --max_timestep")


def _network(config: TrainConfig, given: Given, problems: Problems) -> None:
    network = config.network
    read_network_args(network.network_args, problems)
    if network.rank > _LARGEST_RANK:
        problems.add(f"--network_dim {network.rank} is more than a layer has to offer; {_LARGEST_RANK} is the most")
    if network.dim_from_weights and network.network_weights is None:
        problems.add("--dim_from_weights needs --network_weights, the LoRA file to take the rank from")
    elif network.dim_from_weights:
        _without_effect(given, ("network_dim", "network_alpha"), "with --dim_from_weights")
    weights, multipliers = len(network.base_weights), len(network.base_weights_multiplier)
    if multipliers > weights:
        problems.add(f"--base_weights_multiplier has {multipliers} values for {weights} --base_weights")
    elif multipliers < weights:
        say_once(f"--base_weights: the last {weights - multipliers} without a multiplier are merged at strength 1")


def _saving(config: TrainConfig, given: Given, problems: Problems) -> None:
    saving = config.saving
    if saving.output_name is not None and not is_portable_name(saving.output_name):
        problems.add(
            f"--output_name {saving.output_name!r} is no file name; letters, digits, - and _ are safe, folders belong "
            "in --output_dir"
        )
    if saving.no_metadata:
        _without_effect(given, ("training_comment",), "with --no_metadata")
    for unit in ("epochs", "steps"):
        last = (f"save_last_n_{unit}", f"save_last_n_{unit}_state")
        if getattr(saving, f"save_every_n_{unit}") is None:
            _without_effect(given, last, f"without --save_every_n_{unit}")
        elif not saving.save_state:
            _without_effect(given, last[1:], "without --save_state")


def _previews(config: TrainConfig, given: Given, problems: Problems) -> None:
    previews = config.previews
    wanted = [name for name in ("sample_every_n_steps", "sample_every_n_epochs", "sample_at_first") if name in given]
    wanted = [name for name in wanted if getattr(previews, name)]
    if previews.sample_prompts is None:
        if wanted and "sample_prompts" not in given:
            flags = " and ".join(f"--{name}" for name in wanted)
            problems.add(f"{flags}: previews need prompts; add --sample_prompts sampling.txt, or remove the flag")
        return
    if not wanted:
        say_once("--sample_prompts makes no previews without --sample_every_n_epochs, _n_steps or --sample_at_first")
        return
    for name in ("vae", "t5"):
        if getattr(config.model, name) is None and name not in given:
            problems.add(f"previews need --{name}: {_REQUIRED[name]}")


def _logging(config: TrainConfig, given: Given, problems: Problems) -> None:
    logging = config.logging
    if logging.log_with in ("tensorboard", "all") and logging.logging_dir is None and "logging_dir" not in given:
        problems.add(f"--log_with {logging.log_with} needs a folder, for example --logging_dir logs")
    if logging.log_with is None and logging.logging_dir is None:
        names = ("log_prefix", "log_tracker_name", "log_tracker_config", "log_config")
        _without_effect(given, names, "without --logging_dir or --log_with")
    if logging.log_with not in ("wandb", "all"):
        _without_effect(given, ("wandb_run_name", "wandb_api_key"), "without --log_with wandb")


def _memory(config: TrainConfig, given: Given, problems: Problems) -> None:
    memory = config.memory
    if memory.fp8_scaled and not memory.fp8_base:
        say_once("--fp8_scaled implies --fp8_base")
    if memory.fp8_mode is None:
        _without_effect(given, ("quantized_cache",), "without --fp8_base or --fp8_scaled: only fp8 weights are kept")
    if memory.fp8_fast and memory.fp8_mode is None:
        problems.add("--fp8_fast multiplies weights that are in fp8: add --fp8_scaled")
    if not memory.fp8_fast:
        _without_effect(given, ("fp8_fast_transposed",), "without --fp8_fast")
    elif memory.fp8_fast_transposed == "on" and memory.num_swapped:
        problems.add(
            f"--fp8_fast_transposed on keeps a second copy of the weights on the GPU, --blocks_to_swap "
            f"{memory.num_swapped} takes the first away; remove one of them"
        )
    if not memory.blocks_to_swap:
        names = ("use_pinned_memory_for_block_swap", "block_swap_h2d_only", "block_swap_ring_size")
        _without_effect(given, names, "without --blocks_to_swap")
    else:
        pinned = "here: memory of swapped blocks is always pinned"
        _without_effect(given, ("use_pinned_memory_for_block_swap",), pinned)
        _without_effect(given, ("block_swap_h2d_only",), "here: blocks are never copied back")
    if not memory.gradient_checkpointing:
        without = ("gradient_checkpointing_cpu_offload", "activation_memory")
        _without_effect(given, without, "without --gradient_checkpointing")
    if memory.compile is False:
        options = ("backend", "mode", "cpp_wrapper", "dynamic", "fullgraph", "cache_size_limit")
        _without_effect(given, [f"compile_{option}" for option in options], "with --no_compile")
    elif memory.compile_backend != "inductor":
        other = f"with --compile_backend {memory.compile_backend}: only inductor writes code in C++"
        _without_effect(given, ("compile_cpp_wrapper",), other)
