"""What a LoRA file says about itself, in the keys that existing tools read.

`ss_*` keys describe the training (kohya's names, values as text), `modelspec.*` the model (Stability's model spec
1.0.0), `sshs_*` are hashes that galleries find a file by. Values reach this module as plain mappings.
"""

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import safetensors.torch
from torch import Tensor

ARCHITECTURE = "wan2.1/lora"
BASE_MODEL_VERSION = "wan"

RUN_KEYS: tuple[str, ...] = (
    # What musubi writes.
    "session_id",
    "training_started_at",
    "training_finished_at",
    "output_name",
    "learning_rate",
    "num_train_items",
    "num_batches_per_epoch",
    "num_epochs",
    "steps",
    "epoch",
    "gradient_checkpointing",
    "gradient_checkpointing_cpu_offload",
    "gradient_accumulation_steps",
    "max_train_steps",
    "lr_warmup_steps",
    "lr_scheduler",
    "network_module",
    "network_dim",
    "network_alpha",
    "network_dropout",
    "network_args",
    "mixed_precision",
    "seed",
    "training_comment",
    "optimizer",
    "max_grad_norm",
    "fp8_base",
    "full_fp16",
    "full_bf16",
    "weighting_scheme",
    "logit_mean",
    "logit_std",
    "mode_scale",
    "guidance_scale",
    "timestep_sampling",
    "sigmoid_scale",
    "discrete_flow_shift",
    "datasets",
    "sd_model_name",
    "vae_name",
    # What a reader of the file needs besides.
    "task",
    "fp8_scaled",
    "min_timestep",
    "max_timestep",
    "preserve_distribution_shape",
    "blocks_to_swap",
    "sd_model_fingerprint",
    "target_modules",
    "save_format",
    "save_precision",
    "num_parameters",
    "trainer_version",
)
"""Keys of `lora_metadata`'s `run`, each written as `ss_` and the key."""
_ALWAYS = ("network_module", "network_dim", "network_alpha", "network_args")
_SPEC_KEYS = ("author", "description", "license", "tags")


def lora_metadata(
    run: Mapping[str, Any],
    *,
    title: str | None = None,
    architecture: str | None = None,
    resolution: str | None = None,
    spec: Mapping[str, str | None] | None = None,
    minimal: bool = False,
) -> dict[str, str]:
    """All keys of a LoRA file but the hashes, as text.

    `run` has values for `RUN_KEYS`; one that is missing is written as `None`, except `network_args`, which is left out.
    `title` defaults to `output_name`; `resolution` to 1280x720; `spec` may hold author, description, license and tags.
    `minimal` (`--no_metadata`) keeps what a loader needs. Raises `ValueError` for an unknown key.
    """
    if unknown := [key for key in run if key not in RUN_KEYS]:
        raise ValueError(f"no metadata key is called {unknown[0]!r}")
    keys = _ALWAYS if minimal else RUN_KEYS
    written = {"ss_base_model_version": BASE_MODEL_VERSION}
    written |= {f"ss_{key}": _text(run.get(key)) for key in keys if key != "network_args" or run.get(key)}
    now = datetime.now(UTC)
    title = title or run.get("output_name") or f"LoRA@{now.timestamp():.0f}"
    written |= {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture or ARCHITECTURE,
        "modelspec.implementation": "https://github.com/Wan-Video/Wan2.1",
        "modelspec.title": title,
        "modelspec.date": now.replace(tzinfo=None, microsecond=0).isoformat(),
        "modelspec.resolution": resolution or "1280x720",
    }
    written |= {f"modelspec.{key}": value for key in _SPEC_KEYS if (value := (spec or {}).get(key))}
    low, high = run.get("min_timestep"), run.get("max_timestep")
    if low is not None or high is not None:
        written["modelspec.timestep_range"] = f"{0 if low is None else low},{1000 if high is None else high}"
    return written


def model_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """`sshs_model_hash` and `sshs_legacy_hash` as kohya's trainers compute them.

    Both are taken of the file as it would be with its `ss_*` metadata alone: the first is the SHA-256 of everything
    behind the header, the second the first 8 digits of the SHA-256 of 64 KiB that begin at 1 MiB.
    """
    training = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    content = memoryview(safetensors.torch.save(dict(tensors), training))
    start = 8 + int.from_bytes(content[:8], "little")
    return {
        "sshs_model_hash": hashlib.sha256(content[start:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8],
    }


def _text(value: Any) -> str:
    """Mappings and lists as JSON, everything else as Python writes it."""
    return json.dumps(value) if isinstance(value, (dict, list, tuple)) else str(value)
