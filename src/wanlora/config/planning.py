"""What `wanlora plan` is asked beyond the flags of the run that it plans."""

from dataclasses import dataclass, field
from pathlib import Path

from wanlora.config.fields import Checked
from wanlora.config.kinds import Positive
from wanlora.config.train import TrainConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanningConfig(Checked):
    """Planning."""

    card: str | None = None
    """Plan for this card, for example "RTX 4090". Default: the one in this machine."""
    vram: Positive | None = None
    """Plan for a card of so many GiB."""
    json: Path | None = None
    """Write the plan to this file too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedConfig(TrainConfig):
    """wanlora plan: says what a training run will need; takes its flags and these."""

    planning: PlanningConfig = field(default_factory=PlanningConfig)
