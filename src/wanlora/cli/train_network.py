"""wan_train_network.py: trains a LoRA on the caches."""

import sys
from collections.abc import Sequence

from wanlora.cli.entry import run_command
from wanlora.config.flags import parse_train
from wanlora.diffusion.solvers import SOLVERS
from wanlora.diffusion.timesteps import TIMESTEP_SAMPLERS
from wanlora.diffusion.weighting import LOSS_WEIGHTINGS
from wanlora.models.wan.spec import FUTURE_TASKS, TASKS
from wanlora.training.optimizers import OPTIMIZERS
from wanlora.training.run import train
from wanlora.training.schedules import NOT_SCHEDULES, SCHEDULES


def choices() -> dict[str, tuple[str, ...]]:
    """The names that users choose from, by flag."""
    return {
        "task": tuple(TASKS),
        "timestep_sampling": TIMESTEP_SAMPLERS.names,
        "weighting_scheme": LOSS_WEIGHTINGS.names,
        "sample_solver": SOLVERS.names,
        "optimizer_type": OPTIMIZERS.names,
        "lr_scheduler": (*SCHEDULES.names, "piecewise_constant"),
    }


def command(argv: Sequence[str]) -> int:
    """Train as the arguments say."""
    train(parse_train(argv, choices(), refusals={"task": FUTURE_TASKS, "lr_scheduler": NOT_SCHEDULES}))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The script."""
    return run_command(command, argv)


if __name__ == "__main__":
    sys.exit(main())
