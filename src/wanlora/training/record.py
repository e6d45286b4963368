"""What a LoRA file says about the run that made it."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import wanlora
from wanlora.config.dataset import DatasetConfig
from wanlora.config.train import TrainConfig
from wanlora.foundation.files import fingerprint
from wanlora.lora.metadata import lora_metadata
from wanlora.training.position import Position
from wanlora.training.prepare import Prepared


class FileRecord:
    """Makes the metadata of every file of one run; what does not change is worked out once."""

    def __init__(
        self,
        config: TrainConfig,
        prepared: Prepared,
        *,
        seed: int,
        total_steps: int,
        steps_per_epoch: int,
        num_parameters: int,
    ) -> None:
        self.config = config
        self.started = time.time()
        self.fixed = {
            **_run(config, prepared, seed, total_steps),
            "num_epochs": -(-total_steps // steps_per_epoch),
            "num_parameters": num_parameters,
            "target_modules": _common_targets(prepared),
            "training_started_at": self.started,
            "session_id": int(self.started * 1000) % 2**32,
        }

    def __call__(self, position: Position) -> dict[str, str]:
        """The metadata of a file saved at `position`."""
        metadata = self.config.metadata
        changing = {"steps": position.step, "epoch": position.epoch, "training_finished_at": time.time()}
        return lora_metadata(
            {**self.fixed, **changing},
            title=metadata.metadata_title,
            architecture=metadata.metadata_arch,
            resolution=metadata.metadata_reso,
            spec={
                "author": metadata.metadata_author,
                "description": metadata.metadata_description,
                "license": metadata.metadata_license,
                "tags": metadata.metadata_tags,
            },
            minimal=self.config.saving.no_metadata,
        )


def _run(config: TrainConfig, prepared: Prepared, seed: int, total_steps: int) -> dict[str, Any]:
    """The values that stay the same."""
    run, network, saving, memory = config.run, config.network, config.saving, config.memory
    timesteps, optimizer, plan = config.timesteps, prepared.optimizer, prepared.plan
    assert config.model.dit is not None
    maker = f"{optimizer.maker.__module__}.{getattr(optimizer.maker, '__name__', optimizer.name)}"
    arguments = ",".join(f"{key}={value}" for key, value in config.optimizer.kwargs.items())
    return {
        "output_name": saving.output_name,
        "learning_rate": config.optimizer.learning_rate,
        "num_train_items": plan.num_samples,
        "num_batches_per_epoch": plan.num_batches,
        "gradient_checkpointing": memory.gradient_checkpointing,
        "gradient_checkpointing_cpu_offload": memory.gradient_checkpointing_cpu_offload,
        "gradient_accumulation_steps": run.gradient_accumulation_steps,
        "max_train_steps": total_steps,
        "lr_warmup_steps": config.schedule.lr_warmup_steps,
        "lr_scheduler": config.schedule.lr_scheduler,
        "network_module": network.network_module,
        "network_dim": _common(prepared.ranks, network.rank),
        "network_alpha": _common(prepared.alphas, network.network_alpha),
        "network_dropout": network.network_dropout,
        "network_args": _pairs(network.network_args),
        "mixed_precision": run.mixed_precision,
        "seed": seed,
        "training_comment": saving.training_comment,
        "optimizer": f"{maker}({arguments})" if arguments else maker,
        "max_grad_norm": config.optimizer.max_grad_norm,
        "fp8_base": memory.fp8_mode is not None,
        "fp8_scaled": memory.fp8_mode == "scaled",
        "full_fp16": False,
        "full_bf16": False,
        "weighting_scheme": timesteps.weighting_scheme,
        "logit_mean": timesteps.logit_mean,
        "logit_std": timesteps.logit_std,
        "mode_scale": timesteps.mode_scale,
        "guidance_scale": 1.0,
        "timestep_sampling": timesteps.timestep_sampling,
        "sigmoid_scale": timesteps.sigmoid_scale,
        "discrete_flow_shift": timesteps.discrete_flow_shift,
        "min_timestep": timesteps.min_timestep,
        "max_timestep": timesteps.max_timestep,
        "preserve_distribution_shape": timesteps.preserve_distribution_shape,
        "datasets": [_dataset(dataset.config, len(dataset.items)) for dataset in plan.datasets],
        "sd_model_name": config.model.dit.name,
        "sd_model_fingerprint": fingerprint(_a_file(config.model.dit)).digest,
        "vae_name": config.model.vae.name if config.model.vae else None,
        "task": config.model.task,
        "blocks_to_swap": memory.blocks_to_swap,
        "save_format": saving.save_format,
        "save_precision": saving.save_precision or "float32",
        "trainer_version": f"wanlora {wanlora.__version__}",
    }


def _dataset(config: DatasetConfig, num_items: int) -> dict[str, Any]:
    """One table of the dataset file, without paths that say more about the user than about the data."""
    names = ("resolution", "batch_size", "num_repeats", "enable_bucket", "bucket_no_upscale")
    windows = ("target_frames", "frame_extraction", "frame_stride", "frame_sample", "max_frames", "source_fps")
    described = {name: getattr(config, name) for name in (*names, *windows) if hasattr(config, name)}
    return {**described, "folder": config.source.name, "num_items": num_items}


def _common(by_module: Mapping[str, float] | None, given: float) -> float | str:
    """The value that all modules have: the flag's, or that of --dim_from_weights; `Dynamic` where it differs."""
    values = set(by_module.values()) if by_module else {given}
    return values.pop() if len(values) == 1 else "Dynamic"


def _common_targets(prepared: Prepared) -> str:
    """The distinct layer names that are trained: `self_attn.q` and so on."""
    return ",".join(sorted({target.split(".", 2)[2] for target in prepared.targets}))


def _pairs(arguments: tuple[str, ...]) -> str | None:
    pairs: Mapping[str, str] = dict(argument.split("=", 1) for argument in arguments)
    return json.dumps(pairs) if pairs else None


def _a_file(path: Path) -> Path:
    """The file itself, or the first weights file of a folder."""
    return path if path.is_file() else min(path.glob("*.safetensors"))
