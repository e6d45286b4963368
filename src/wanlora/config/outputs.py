"""What a run leaves behind: files, previews, a validation loss, logs, metadata. Part of `train.TrainConfig`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from wanlora.config.fields import Checked
from wanlora.config.kinds import Count, ExistingPath


@dataclass(frozen=True, kw_only=True, slots=True)
class SavingConfig(Checked):
    """Saving and resuming."""

    output_dir: Path | None = None
    """Folder of the LoRA files, states and previews."""
    output_name: str | None = None
    """Name of the LoRA, without a suffix."""
    save_every_n_epochs: Count | None = None
    """Save the LoRA every so many epochs."""
    save_every_n_steps: Count | None = None
    """Save the LoRA every so many steps."""
    save_last_n_epochs: Count | None = None
    """Keep the LoRA files of only the last so many epochs."""
    save_last_n_epochs_state: Count | None = None
    """Keep the states of only the last so many epochs. Default: --save_last_n_epochs."""
    save_last_n_steps: Count | None = None
    """Keep the LoRA files of only the last so many steps."""
    save_last_n_steps_state: Count | None = None
    """Keep the states of only the last so many steps. Default: --save_last_n_steps."""
    save_state: bool = False
    """Save what resuming needs beside every LoRA file."""
    save_state_on_train_end: bool = False
    """Save what resuming needs at the end."""
    save_precision: Literal["float", "fp32", "fp16", "bf16"] | None = None
    """Number format of the LoRA file. Default: fp32."""
    save_format: Literal["kohya", "comfy", "diffusers"] = "kohya"
    """Spelling of the LoRA file's keys; ComfyUI reads all three."""
    resume: Path | None = None
    """Go on from this state folder; latest means the newest state of --output_name in --output_dir."""
    no_metadata: bool = False
    """Leave the settings out of the LoRA file."""
    training_comment: str | None = None
    """A note for the LoRA file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PreviewConfig(Checked):
    """Previews during training."""

    sample_prompts: ExistingPath | None = None
    """Prompt file: .txt, .toml or .json."""
    sample_every_n_steps: Count | None = None
    """Make previews every so many steps."""
    sample_every_n_epochs: Count | None = None
    """Make previews every so many epochs."""
    sample_at_first: bool = False
    """Make previews before the first step."""
    sample_solver: str = "unipc"
    """Solver of the previews."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationConfig(Checked):
    """Validation on the dataset file's [[validation]] tables."""

    validate_every_n_steps: Count | None = None
    """Measure the validation loss every so many steps."""
    validate_every_n_epochs: Count | None = None
    """Measure the validation loss every so many epochs. Default: 1, unless --validate_every_n_steps is given."""
    validation_levels: Count = 4
    """At how many noise levels each validation sample is measured."""

    @property
    def epochs_between(self) -> int | None:
        """Validate every so many epochs; None for never."""
        return self.validate_every_n_epochs or (None if self.validate_every_n_steps else 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoggingConfig(Checked):
    """Trackers."""

    logging_dir: Path | None = None
    """Folder of the logs; alone it turns on tensorboard."""
    log_with: Literal["tensorboard", "wandb", "all"] | None = None
    """Where numbers are logged."""
    log_prefix: str | None = None
    """Put before the time in the name of a run's log folder."""
    log_tracker_name: str | None = None
    """Name of the project in the tracker. Default: network_train."""
    wandb_run_name: str | None = None
    """Name of the run in Weights & Biases."""
    wandb_api_key: str | None = None
    """Key for Weights & Biases; it is written to no file."""
    log_tracker_config: ExistingPath | None = None
    """TOML with settings for the tracker."""
    log_config: bool = False
    """Log the settings of the run too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MetadataConfig(Checked):
    """Metadata of the LoRA file."""

    metadata_title: str | None = None
    """Title. Default: --output_name."""
    metadata_author: str | None = None
    """Author."""
    metadata_description: str | None = None
    """Description."""
    metadata_license: str | None = None
    """License."""
    metadata_tags: str | None = None
    """Tags, separated by commas."""
    metadata_reso: str | None = None
    """Resolution, for example 1280x720. Default: 1280x720."""
    metadata_arch: str | None = None
    """Architecture. Default: that of the task."""
