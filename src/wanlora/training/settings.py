"""A run's settings as plain text: for trackers, and for telling whether a resumed run is the same run."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from wanlora.config.train import TimestepConfig, TrainConfig

_SECRET = {"wandb_api_key"}
_WITHOUT_EFFECT_ON_STEPS = {"previews", "validation", "logging", "metadata"}
_HARMLESS = {
    *("save_every_n_epochs", "save_every_n_steps", "save_last_n_epochs", "save_last_n_epochs_state"),
    *("save_last_n_steps", "save_last_n_steps_state", "save_state", "save_state_on_train_end", "save_precision"),
    *("save_format", "resume", "no_metadata", "training_comment", "output_dir", "output_name"),
    *("max_train_steps", "max_train_epochs", "max_data_loader_n_workers", "persistent_data_loader_workers"),
    *("dry_run", "debug", "ddp_timeout", "vae", "vae_dtype", "vae_cache_cpu", "t5", "fp8_t5", "tokenizer", "offline"),
    *("dit", "dataset_config", "base_weights", "network_weights", "device", "show_timesteps", "seed"),
    *("split_attn", "ddp_gradient_as_bucket_view", "ddp_static_graph", "block_swap_ring_size", "blocks_to_swap"),
    *("use_pinned_memory_for_block_swap", "block_swap_h2d_only"),
    *("activation_memory", "vram_reserve", "vram_limit", "on_oom", "trial_step", "cuda_graphs"),
    *("fp8_fast_transposed", "vae_tiling", "compile_cpp_wrapper"),
}


def all_settings(config: TrainConfig) -> dict[str, str]:
    """Every flag and its value as text, secrets left out."""
    return {name: str(value) for _, name, value in _leaves(config) if name not in _SECRET}


def decisive_settings(config: TrainConfig) -> dict[str, str]:
    """The settings that change what a step computes, given the same files."""
    return {
        name: str(value)
        for group, name, value in _leaves(config)
        if group not in _WITHOUT_EFFECT_ON_STEPS and name not in _HARMLESS
    }


def differences(saved: Mapping[str, str], current: Mapping[str, str]) -> list[str]:
    """`name: saved -> current` for every setting that differs."""
    return [
        f"{name}: {saved.get(name, 'unset')} -> {current.get(name, 'unset')}"
        for name in sorted(saved.keys() | current.keys())
        if saved.get(name) != current.get(name)
    ]


def timestep_settings(config: TimestepConfig) -> dict[str, Any]:
    """The settings of the noise levels by name, as `diffusion.timesteps.build_plan` takes them."""
    return {setting.name: getattr(config, setting.name) for setting in fields(config)}


def _leaves(config: TrainConfig) -> Iterator[tuple[str, str, Any]]:
    for group in fields(config):
        value = getattr(config, group.name)
        assert is_dataclass(value)
        for leaf in fields(value):
            yield group.name, leaf.name, getattr(value, leaf.name)
