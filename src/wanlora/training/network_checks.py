"""Which modules a run trains, and that the LoRA files and the state that it starts from fit them.

The adapters are put on a model without memory (meta device), so that the same code that would refuse a file after
hours of loading refuses it now.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from wanlora.config.train import NetworkConfig
from wanlora.foundation.blank import without_memory
from wanlora.foundation.errors import ConfigError, Problems
from wanlora.foundation.tensor_files import open_tensors
from wanlora.lora.files import read_lora, shapes_from_weights
from wanlora.lora.merge import MergedLoRAs
from wanlora.lora.network import inject
from wanlora.lora.targets import candidates, select_targets
from wanlora.models.wan.transformer import WanTransformer
from wanlora.training.state import ADAPTER


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkChoice:
    """What is trained."""

    targets: tuple[str, ...]
    """Official paths of the modules."""
    partial: bool
    """Some linear layers of the blocks are left out."""
    ranks: Mapping[str, int] | None
    """By module, from --dim_from_weights."""
    alphas: Mapping[str, float] | None
    down_shapes: Mapping[str, tuple[int, int]]
    """Rank and inputs of each module, in the order of `targets`."""


def choose_network(
    config: NetworkConfig, blank: WanTransformer, problems: Problems, *, state: Path | None
) -> NetworkChoice:
    """The modules to train in `blank`, a model on the meta device, which is adapted here.

    Adds what is wrong with --base_weights, --network_weights and the folder `state` to `problems`. Raises
    `ConfigError` for patterns that choose nothing.
    """
    modules = candidates(blank)
    with problems.collect():
        merged = config.merged_weights
        files = MergedLoRAs([path for path, _ in merged], [factor for _, factor in merged])
        files.check({name: tuple(tensor.shape) for name, tensor in blank.named_parameters()})
    arguments, ranks, alphas = config.args, None, None
    targets = select_targets(blank, arguments.include_patterns, arguments.exclude_patterns)
    if config.network_weights is not None and config.dim_from_weights:
        ranks, alphas = shapes_from_weights(config.network_weights, modules)
        targets = tuple(target for target in targets if target in ranks)
    with without_memory():
        network = inject(blank, targets, rank=ranks or config.rank, alpha=alphas, generator=torch.Generator())
    with problems.collect():
        if config.network_weights is not None:
            network.check(read_lora(config.network_weights, modules), f"--network_weights {config.network_weights}")
    with problems.collect():
        if state is not None:
            with open_tensors(state / ADAPTER) as source:
                network.check_state({name: source.shape(name) for name in source.names}, f"--resume {state}")
    return NetworkChoice(
        targets=targets,
        partial=set(targets) != set(modules),
        ranks=ranks,
        alphas=alphas,
        down_shapes={name: (adapter.rank, adapter.in_features) for name, adapter in network.adapters.items()},
    )


def import_network(name: str | None) -> None:
    """Raise `ConfigError` unless --network_module is a module that makes LoRAs for Wan."""
    try:
        module = importlib.import_module(name or "")
    except (ImportError, ValueError, TypeError) as error:
        raise ConfigError(f"--network_module {name} cannot be imported ({error}); use networks.lora_wan") from error
    if not hasattr(module, "inject"):
        raise ConfigError(f"--network_module {name} makes no LoRA for Wan; use networks.lora_wan")
