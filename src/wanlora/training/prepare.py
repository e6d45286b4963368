"""Everything that can be wrong, found before a model loads.

Files are opened for their headers only; each check leaves its finding among the problems and the next one goes on, so
that one attempt shows the user everything there is to mend.
"""

import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from wanlora.config.dataset import read_datasets
from wanlora.config.prompts import read_prompts
from wanlora.config.train import ModelConfig, NetworkConfig, SavingConfig, TrainConfig
from wanlora.data.checks import check_caches
from wanlora.data.plan import DataPlan, plan_datasets
from wanlora.diffusion.timesteps import TimestepPlan, build_plan
from wanlora.foundation.errors import CheckpointError, ConfigError, Problems
from wanlora.foundation.log import log, say_once
from wanlora.foundation.tensor_files import open_tensors
from wanlora.generation.requests import PreviewRequest, resolve_all
from wanlora.lora.files import read_lora, shapes_from_weights
from wanlora.lora.targets import candidates, select_targets
from wanlora.memory.placement import streamed_indexes
from wanlora.models.attention import require_kernel
from wanlora.models.wan.checkpoint import TransformerFile, check_task, inspect_transformer
from wanlora.models.wan.recognise import describe, file_kind
from wanlora.models.wan.spec import TASKS, WanSpec
from wanlora.models.wan.text import load_tokenizer
from wanlora.models.wan.transformer import WanTransformer
from wanlora.training.optimizers import OptimizerChoice, choose_optimizer
from wanlora.training.schedules import build_schedule
from wanlora.training.settings import timestep_settings
from wanlora.training.state import RunRecord, latest_state, read_record
from wanlora.training.trackers import tracker_options, wanted_trackers

LATEST = "latest"


@dataclass(frozen=True, kw_only=True, slots=True)
class Resume:
    """The state that a run goes on from."""

    folder: Path
    record: RunRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """What the checks found out, ready for use."""

    task: WanSpec
    transformer: TransformerFile
    plan: DataPlan
    timesteps: TimestepPlan
    optimizer: OptimizerChoice
    requests: tuple[PreviewRequest, ...]
    targets: tuple[str, ...]
    """Official paths of the modules that are trained."""
    partial: bool
    """Some linear layers of the blocks are left out."""
    ranks: Mapping[str, int] | None = None
    """By module, from --dim_from_weights."""
    alphas: Mapping[str, float] | None = None
    resume: Resume | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Network:
    targets: tuple[str, ...]
    partial: bool
    ranks: Mapping[str, int] | None
    alphas: Mapping[str, float] | None


def prepare(config: TrainConfig) -> Prepared:
    """Check everything. Raises one error that lists every problem."""
    problems = Problems()
    found: dict[str, object] = {}
    with problems.collect():
        found["plan"] = _plan(config, problems)
    with problems.collect():
        found["transformer"] = transformer = _inspect(config.model)
        with problems.collect():
            streamed_indexes(transformer.sizes.num_layers, config.memory.blocks_to_swap or 0)
        network = _check_network(config.network, transformer)
        found |= {name: getattr(network, name) for name in ("targets", "partial", "ranks", "alphas")}
    with problems.collect():
        found["requests"] = _check_previews(config, problems)
    with problems.collect():
        found["optimizer"] = optimizer = choose_optimizer(config.optimizer, config.optimizer.kwargs)
        optimizer.build([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 0.0, "name": "trial"}])
    with problems.collect():
        build_schedule(config.schedule, total=1, base_rate=config.optimizer.learning_rate)
    with problems.collect():
        found["timesteps"] = build_plan(**timestep_settings(config.timesteps))
    with problems.collect():
        found["resume"] = _find_resume(config.saving)
    for kernel in {config.attention.training_kernel, config.attention.preview_kernel}:
        with problems.collect():
            require_kernel(kernel)
    with problems.collect():
        wanted_trackers(config.logging)
        tracker_options(config.logging)
    with problems.collect():
        _check_output(config.saving)
    problems.raise_all(ConfigError)
    return Prepared(task=TASKS[config.model.task], **found)  # type: ignore[arg-type]


def _plan(config: TrainConfig, problems: Problems) -> DataPlan:
    assert config.run.dataset_config is not None
    plan = plan_datasets(read_datasets(config.run.dataset_config), sources_may_be_absent=True, write_index=False)
    for problem in check_caches(plan):
        problems.add(problem)
    return plan


def _inspect(model: ModelConfig) -> TransformerFile:
    assert model.dit is not None
    with open_tensors(model.dit) as source:
        transformer = inspect_transformer(source)
    check_task(transformer, model.task)
    return transformer


def _check_network(config: NetworkConfig, transformer: TransformerFile) -> _Network:
    """Which modules are trained; that files of earlier LoRAs fit."""
    _import_network(config.network_module)
    with torch.device("meta"):
        model = WanTransformer(transformer.sizes)
    arguments = config.args
    targets = select_targets(model, arguments.include_patterns, arguments.exclude_patterns)
    modules = candidates(model)
    for path, _ in config.merged_weights:
        read_lora(path, modules)
    ranks = alphas = None
    if config.network_weights is not None:
        if config.dim_from_weights:
            ranks, alphas = shapes_from_weights(config.network_weights, modules)
            targets = tuple(target for target in targets if target in ranks)
        else:
            _check_ranks(config, read_lora(config.network_weights, modules), targets)
    return _Network(targets=targets, partial=set(targets) != set(modules), ranks=ranks, alphas=alphas)


def _check_ranks(config: NetworkConfig, weights: Mapping[str, object], targets: tuple[str, ...]) -> None:
    ranks = {int(getattr(weight, "rank")) for weight in weights.values()}  # noqa: B009
    if ranks != {config.rank}:
        listed = ", ".join(map(str, sorted(ranks)))
        raise CheckpointError(
            f"--network_weights {config.network_weights} has rank {listed}, this run --network_dim {config.rank}; "
            f"use --network_dim {listed} or --dim_from_weights"
        )
    if unknown := sorted(set(weights) - set(targets)):
        raise CheckpointError(
            f"--network_weights {config.network_weights} adapts {len(unknown)} modules that this run leaves out "
            f"({unknown[0]}, …); change include_patterns and exclude_patterns, or merge the file with --base_weights"
        )


def _import_network(name: str | None) -> None:
    """The module must be the one that makes LoRAs for Wan."""
    try:
        module = importlib.import_module(name or "")
    except (ImportError, ValueError) as error:
        raise ConfigError(f"--network_module {name} cannot be imported ({error}); use networks.lora_wan") from error
    if not hasattr(module, "inject"):
        raise ConfigError(f"--network_module {name} makes no LoRA for Wan; use networks.lora_wan")


def _check_previews(config: TrainConfig, problems: Problems) -> tuple[PreviewRequest, ...]:
    """The previews, and that the files they need are there and are what they should be."""
    previews, model = config.previews, config.model
    wanted = previews.sample_at_first or previews.sample_every_n_steps or previews.sample_every_n_epochs
    if previews.sample_prompts is None or not wanted:
        return ()
    assert model.vae is not None and model.t5 is not None
    for flag, path in (("--vae", model.vae), ("--t5", model.t5)):
        with problems.collect():
            _require_kind(path, flag)
    with problems.collect():
        load_tokenizer(model.tokenizer, model.t5, model.offline)
    return resolve_all(read_prompts(previews.sample_prompts), TASKS[model.task])


def _require_kind(path: Path, flag: str) -> None:
    """The file is what the flag takes, by the names of its tensors."""
    with open_tensors(path) as source:
        kind = file_kind(source.names)
        if kind is None or kind.flag != flag:
            raise CheckpointError(f"{flag} {path} {describe(source.names)}; pass the file that belongs to {flag}")


def _find_resume(saving: SavingConfig) -> Resume | None:
    if saving.resume is None:
        return None
    folder: Path | None = Path(saving.resume)
    if str(saving.resume) == LATEST:
        assert saving.output_dir is not None and saving.output_name is not None
        folder = latest_state(saving.output_dir, saving.output_name)
        if folder is None:
            say_once(
                f"--resume latest: {saving.output_dir} holds no state of {saving.output_name} yet; this run begins anew"
            )
            return None
        log.info(f"--resume latest: {folder}")
    assert folder is not None
    return Resume(folder=folder, record=read_record(folder))


def _check_output(saving: SavingConfig) -> None:
    """The folder can be written to; what a run of this name left there is announced."""
    assert saving.output_dir is not None and saving.output_name is not None
    existing = next(folder for folder in (saving.output_dir, *saving.output_dir.absolute().parents) if folder.exists())
    if not existing.is_dir():
        raise ConfigError(f"--output_dir {saving.output_dir}: {existing} is a file; choose another folder")
    if not os.access(existing, os.W_OK):
        raise ConfigError(f"--output_dir {saving.output_dir} cannot be written to; choose another folder")
    final = saving.output_dir / f"{saving.output_name}.safetensors"
    if final.exists() and saving.resume is None:
        say_once(
            f"{final} exists and will be replaced when this run is finished; files of the same step or epoch likewise"
        )
