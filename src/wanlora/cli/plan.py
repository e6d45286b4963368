"""`wanlora plan`: what a training run will need, before anything is loaded."""

from collections.abc import Sequence

from wanlora.cli.train_network import choices
from wanlora.config.flags import parse_plan
from wanlora.models.wan.spec import FUTURE_TASKS
from wanlora.training.planning import plan_run
from wanlora.training.schedules import NOT_SCHEDULES


def command(argv: Sequence[str]) -> int:
    """Plan the run that the arguments describe."""
    plan_run(parse_plan(argv, choices(), refusals={"task": FUTURE_TASKS, "lr_scheduler": NOT_SCHEDULES}))
    return 0
