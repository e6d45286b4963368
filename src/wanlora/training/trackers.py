"""TensorBoard and Weights & Biases, through accelerate's trackers.

Every number is logged on one axis, the optimizer step, which a resumed run continues. A tracker that fails says so and
does not end the run.
"""

import importlib.util
import time
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wanlora.config.outputs import LoggingConfig
from wanlora.foundation.errors import ConfigError
from wanlora.foundation.log import warn_once
from wanlora.training.engine import Engine

DEFAULT_PROJECT = "network_train"
_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}


def wanted_trackers(config: LoggingConfig) -> list[str]:
    """The trackers that the flags ask for. Raises `ConfigError` if one's package or folder is missing."""
    if config.log_with is None:
        names = ["tensorboard"] if config.logging_dir else []
    else:
        names = list(_PACKAGES) if config.log_with == "all" else [config.log_with]
    for name in names:
        if importlib.util.find_spec(_PACKAGES[name]) is None:
            raise ConfigError(f"--log_with {name} needs its package: pip install {_PACKAGES[name]}")
    if "tensorboard" in names and config.logging_dir is None:
        raise ConfigError("--log_with tensorboard needs --logging_dir, the folder to write to")
    return names


def tracker_module(config: LoggingConfig) -> str | None:
    """What TensorBoard's tracker will import, a quarter of a second of work; None without it."""
    return "torch.utils.tensorboard" if "tensorboard" in wanted_trackers(config) else None


def run_folder(config: LoggingConfig) -> Path | None:
    """`<logging_dir>/<log_prefix><time>`, the folder of this run's logs."""
    if config.logging_dir is None:
        return None
    return config.logging_dir / f"{config.log_prefix or ''}{time.strftime('%Y%m%d%H%M%S')}"


def tracker_options(config: LoggingConfig) -> dict[str, Any]:
    """What each tracker is started with: the tables of `--log_tracker_config`, and the run's name for W&B."""
    options: dict[str, Any] = {}
    if config.log_tracker_config is not None:
        try:
            options = tomllib.loads(config.log_tracker_config.read_text(encoding="utf-8-sig"))
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"--log_tracker_config {config.log_tracker_config}: {error}") from error
    if config.wandb_run_name:
        options.setdefault("wandb", {})["name"] = config.wandb_run_name
    return options


class Trackers:
    """The trackers of a run."""

    def __init__(self, engine: Engine, config: LoggingConfig, settings: Mapping[str, str]) -> None:
        self.engine = engine
        self.active = bool(wanted_trackers(config))
        if not self.active:
            return
        if config.wandb_api_key and engine.rank.is_main:
            _wandb_login(config.wandb_api_key)
        engine.accelerator.init_trackers(
            config.log_tracker_name or DEFAULT_PROJECT,
            config=dict(settings) if config.log_config else None,
            init_kwargs=tracker_options(config),
        )

    def __call__(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers at an optimizer step."""
        if self.active:
            try:
                self.engine.accelerator.log(dict(values), step=step)
            except (OSError, RuntimeError, ValueError) as error:
                warn_once(f"a tracker refuses numbers ({error}); training goes on, the step log is complete")


def _wandb_login(key: str) -> None:
    wandb: Any = importlib.import_module("wandb")
    wandb.login(key=key)
