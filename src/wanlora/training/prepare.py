"""Everything that can be wrong, found before a model loads.

Files are opened for their headers only; each check leaves its finding among the problems and the next one goes on, so
that one attempt shows the user everything there is to mend.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from wanlora.config.checks import check_paths
from wanlora.config.dataset import read_datasets
from wanlora.config.outputs import SavingConfig
from wanlora.config.prompts import read_prompts
from wanlora.config.train import MemoryConfig, ModelConfig, RunConfig, TrainConfig
from wanlora.data.checks import check_caches
from wanlora.data.plan import DataPlan, plan_datasets
from wanlora.diffusion.timesteps import TimestepPlan, build_plan
from wanlora.foundation.blank import without_memory
from wanlora.foundation.devices import find_device
from wanlora.foundation.dtypes import dtype_name
from wanlora.foundation.errors import CheckpointError, ConfigError, Problems
from wanlora.foundation.laps import start
from wanlora.foundation.log import log, say_once
from wanlora.foundation.tensor_files import open_tensors
from wanlora.generation.requests import PreviewRequest, resolve_all
from wanlora.memory.compile import OWN_GRAPHS, TUNED, TUNING
from wanlora.memory.outlook import Load
from wanlora.memory.placement import streamed_indexes
from wanlora.models.attention import require_dtype, require_kernel
from wanlora.models.wan.checkpoint import TransformerFile, check_complete, check_task, inspect_transformer
from wanlora.models.wan.recognise import require_kind
from wanlora.models.wan.spec import TASKS, WanSizes, WanSpec
from wanlora.models.wan.text import load_tokenizer
from wanlora.models.wan.transformer import WanTransformer
from wanlora.training.engine import compute_dtype
from wanlora.training.network_checks import choose_network, import_network
from wanlora.training.optimizers import OptimizerChoice, choose_optimizer
from wanlora.training.position import Position
from wanlora.training.rates import ForeignRates
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
    down_shapes: Mapping[str, tuple[int, int]]
    """Rank and inputs of each of them."""
    ranks: Mapping[str, int] | None = None
    """By module, from --dim_from_weights."""
    alphas: Mapping[str, float] | None = None
    resume: Resume | None = None
    swapped: Mapping[Load, int] = field(default_factory=dict)
    """How many blocks are swapped for batches of each size, where `--blocks_to_swap auto` took numbers of their own."""

    @property
    def start(self) -> Position:
        """Where the run begins. If the data have changed since the state was saved, the epoch in hand begins anew."""
        if self.resume is None:
            return Position()
        record = self.resume.record
        same = record.epoch_length == self.plan.num_batches
        return record.position if same else replace(record.position, batch=0)


def prepare(config: TrainConfig, *, caches: bool = True) -> Prepared:
    """Check everything, but for the cache files without `caches`. Raises one error that lists every problem."""
    problems = Problems()
    found: dict[str, object] = {}
    with problems.collect():
        check_paths(config)
    with problems.collect():
        import_network(config.network.network_module)
    with problems.collect():
        found["resume"] = resume = _find_resume(config.saving)
        _check_same_optimizer(config.optimizer.optimizer_type, resume)
        _check_same_alpha(config, resume)
    with start.part("model"):
        sizes = _check_model(config, problems, found)
    if _are_there(config.run.dataset_config):
        with problems.collect(), start.part("data"):
            found["plan"] = _plan(config, problems, sizes, caches=caches)
    with problems.collect(), start.part("previews"):
        found["requests"] = _check_previews(config, problems)
    with problems.collect(), start.part("optimizer"):
        found["optimizer"] = _check_optimizer(config, problems)
    with problems.collect():
        found["timesteps"] = build_plan(**timestep_settings(config.timesteps))
    for kernel in {config.attention.training_kernel, config.attention.preview_kernel}:
        with problems.collect():
            require_kernel(kernel)
    with problems.collect():
        _check_compilation(config.memory, config.run)
    with problems.collect():
        wanted_trackers(config.logging)
        tracker_options(config.logging)
    _check_output(config, problems)
    problems.raise_all(ConfigError)
    return Prepared(task=TASKS[config.model.task], **found)  # type: ignore[arg-type]


def _are_there(*paths: Path | None) -> bool:
    """Whether every path that is given exists; those that do not are named by `check_paths`."""
    return all(path is None or path.exists() for path in paths)


def _check_model(config: TrainConfig, problems: Problems, found: dict[str, object]) -> WanSizes | None:
    """The transformer's file, and all that has to fit it; its sizes if they can be told."""
    with problems.collect():
        compute_dtype(config.run.mixed_precision, torch.float32, find_device(config.run.device))
    if not _are_there(config.model.dit):
        return None
    with problems.collect():
        transformer, blank = _inspect(config.model)
        found["transformer"] = transformer
        with problems.collect():
            device = find_device(config.run.device)
            dtype = compute_dtype(config.run.mixed_precision, transformer.dtypes[0], device)
            require_dtype(config.attention.training_kernel, dtype)
            _check_fp8_maths(config.memory, dtype)
        with problems.collect():
            streamed_indexes(transformer.sizes.num_layers, config.memory.num_swapped)
        if _are_there(config.network.network_weights, *config.network.base_weights):
            resume = found.get("resume")
            assert resume is None or isinstance(resume, Resume)
            choice = choose_network(config.network, blank, problems, state=resume.folder if resume else None)
            found |= {name: getattr(choice, name) for name in ("targets", "partial", "ranks", "alphas", "down_shapes")}
        return transformer.sizes
    return None


def _check_fp8_maths(config: MemoryConfig, dtype: torch.dtype) -> None:
    if config.fp8_fast and dtype is not torch.bfloat16:
        raise ConfigError(
            f"--fp8_fast gives results in bfloat16, the model runs in {dtype_name(dtype)}; use --mixed_precision bf16"
        )


def _inspect(model: ModelConfig) -> tuple[TransformerFile, WanTransformer]:
    """What the file's header says, and the model without memory that it would fill."""
    assert model.dit is not None
    with open_tensors(model.dit) as source:
        transformer = inspect_transformer(source)
        check_task(transformer, model.task)
        with without_memory():
            blank = WanTransformer(transformer.sizes)
        check_complete(source, transformer, blank)
    return transformer, blank


def _plan(config: TrainConfig, problems: Problems, sizes: WanSizes | None, *, caches: bool) -> DataPlan:
    assert config.run.dataset_config is not None
    plan = plan_datasets(read_datasets(config.run.dataset_config), sources_may_be_absent=True, write_index=False)
    channels, text_width = (sizes.in_channels, sizes.text_dim) if sizes else (None, None)
    for problem in check_caches(plan, channels=channels, text_width=text_width) if caches else ():
        problems.add(problem)
    return plan


def _check_optimizer(config: TrainConfig, problems: Problems) -> OptimizerChoice:
    """The optimizer and its schedule, tried on one small matrix."""
    schedule = config.schedule
    if schedule.lr_scheduler_type is None:
        with problems.collect():
            build_schedule(schedule, total=1, base_rate=config.optimizer.learning_rate)
    choice = choose_optimizer(config.optimizer, config.optimizer.kwargs)
    matrix = torch.nn.Parameter(torch.zeros(2, 2))
    trial = choice.build([{"params": [matrix], "lr": choice.arguments["lr"], "name": "unet"}])
    if schedule.lr_scheduler_type is not None:
        ForeignRates(trial, schedule.lr_scheduler_type, schedule.kwargs)
    return choice


def _check_compilation(config: MemoryConfig, run: RunConfig) -> None:
    """torch knows the backend and the mode; to ask it takes seconds, so nobody asks about the usual ones."""
    chosen = (config.compile_backend, config.compile_mode)
    if config.compile is not False and run.deterministic and config.compile_mode in TUNING:
        raise ConfigError(
            f"--compile_mode {config.compile_mode} chooses kernels by their time, which is another in every run, and "
            "--deterministic wants the same numbers; leave one of them out"
        )
    if config.compile is not False and config.compile_cpp_wrapper and config.compile_mode in OWN_GRAPHS:
        raise ConfigError(
            f"--compile_mode {config.compile_mode} replays CUDA graphs, which torch's compiler does not do with "
            "--compile_cpp_wrapper; leave one of them out"
        )
    if config.compile is False or chosen in (("inductor", "default"), ("inductor", TUNED)):
        return
    if config.compile_mode == TUNED:
        raise ConfigError(f"--compile_mode {TUNED} is for --compile_backend inductor; leave one of them out")
    try:
        torch.compile(lambda x: x, backend=chosen[0], mode=chosen[1])
    except RuntimeError as error:
        raise ConfigError(f"--compile_backend {chosen[0]} --compile_mode {chosen[1]}: {error}") from error


def _check_previews(config: TrainConfig, problems: Problems) -> tuple[PreviewRequest, ...]:
    """The previews, and that the files they need are there and are what they should be."""
    previews, model = config.previews, config.model
    wanted = previews.sample_at_first or previews.sample_every_n_steps or previews.sample_every_n_epochs
    if previews.sample_prompts is None or not wanted:
        return ()
    assert model.vae is not None and model.t5 is not None
    for flag, path in (("--vae", model.vae), ("--t5", model.t5)):
        if _are_there(path):
            with problems.collect():
                require_kind(path, flag)
    if _are_there(model.tokenizer, model.t5):
        with problems.collect():
            load_tokenizer(model.tokenizer, model.t5, model.offline)
    if not _are_there(previews.sample_prompts):
        return ()
    return resolve_all(read_prompts(previews.sample_prompts), TASKS[model.task])


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


def _check_same_optimizer(name: str, resume: Resume | None) -> None:
    """Another optimizer may take a state of the same shape and fail, or go wrong, at its first step."""
    saved = resume.record.settings.get("optimizer_type") if resume else None
    if resume and saved and _class_name(saved) != _class_name(name):
        raise CheckpointError(
            f"--resume {resume.folder} was saved with --optimizer_type {saved}, this run has {name}; resume with that "
            "one, or begin a run with --network_weights and the LoRA beside the state"
        )


def _check_same_alpha(config: TrainConfig, resume: Resume | None) -> None:
    """Weights mean something only with the alpha they were trained with."""
    alpha = config.network.network_alpha
    saved = float(resume.record.settings.get("network_alpha", alpha)) if resume else alpha
    rank = config.network.rank
    if resume and not config.network.dim_from_weights and (saved or rank) != (alpha or rank):
        raise CheckpointError(
            f"--resume {resume.folder} was trained with --network_alpha {saved:g}, this run has {alpha:g}, which would "
            f"make the LoRA {(alpha or rank) / (saved or rank):g} times as strong; resume with its own alpha"
        )


def _class_name(optimizer: str) -> str:
    return optimizer.rpartition(".")[2].lower()


def _check_output(config: TrainConfig, problems: Problems) -> None:
    """The folders can be written to; what a run of this name left there is announced."""
    saving = config.saving
    assert saving.output_dir is not None and saving.output_name is not None
    folders = {
        "--output_dir": saving.output_dir,
        "--logging_dir": config.logging.logging_dir,
        "--quantized_cache": config.memory.quantized_cache,
    }
    for flag, folder in folders.items():
        if folder is not None:
            with problems.collect():
                _require_writable(flag, folder)
    final = saving.output_dir / f"{saving.output_name}.safetensors"
    if final.exists() and saving.resume is None:
        say_once(
            f"{final} exists and will be replaced when this run is finished; files of the same step or epoch likewise"
        )


def _require_writable(flag: str, folder: Path) -> None:
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise ConfigError(f"{flag} {folder}: {existing} is a file; choose another folder")
    if not os.access(existing, os.W_OK):
        raise ConfigError(f"{flag} {folder} cannot be written to; choose another folder")
