"""A checked run in a folder where everything is ready."""

from collections.abc import Callable

import pytest

from tests.runs import TrainingFolder
from wanlora.cli.train_network import choices
from wanlora.config.flags import parse_train
from wanlora.config.train import TrainConfig
from wanlora.training.prepare import Prepared, prepare

Checked = Callable[..., tuple[TrainConfig, Prepared]]


@pytest.fixture
def checked(training_folder: TrainingFolder) -> Checked:
    """Call it with flags to get the config and what the checks found."""

    def check(*flags: str) -> tuple[TrainConfig, Prepared]:
        config = parse_train(training_folder.arguments("style", *flags), choices())
        return config, prepare(config)

    return check
