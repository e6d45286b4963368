"""Numbers reach TensorBoard on the axis of optimizer steps."""

from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.fresh import run_fresh
from wanlora.config.outputs import LoggingConfig
from wanlora.config.train import RunConfig
from wanlora.foundation.errors import ConfigError
from wanlora.training.engine import Engine
from wanlora.training.trackers import Trackers, run_folder, tracker_module, tracker_options, wanted_trackers


def test_a_tensorboard_file_holds_every_step(tmp_path: Path) -> None:
    config = LoggingConfig(logging_dir=tmp_path, log_prefix="style_", log_config=True)
    folder = run_folder(config)
    assert folder is not None and folder.parent == tmp_path and folder.name.startswith("style_2")
    engine = Engine.start(RunConfig(device="cpu"), log_with=wanted_trackers(config), logging_dir=folder)
    trackers = Trackers(engine, config, {"learning_rate": "0.0001", "betas": "(0.9, 0.99)"})
    for step in (7, 8):  # as a resumed run counts
        trackers({"loss/current": step / 10, "lr/unet": 1e-4}, step)
    engine.close()
    events = EventAccumulator(str(folder / "network_train"))
    events.Reload()
    assert {"loss/current", "lr/unet"} <= set(events.Tags()["scalars"])
    assert [(event.step, round(event.value, 6)) for event in events.Scalars("loss/current")] == [(7, 0.7), (8, 0.8)]
    assert "learning_rate: '0.0001'" in next((folder / "network_train").glob("*/hparams.yml")).read_text()


def test_what_is_imported_ahead_is_what_the_tracker_imports(tmp_path: Path) -> None:
    module = tracker_module(LoggingConfig(logging_dir=tmp_path))
    assert module is not None and tracker_module(LoggingConfig()) is None
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from wanlora.config.outputs import LoggingConfig\nfrom wanlora.config.train import RunConfig\n"
        "from wanlora.training.engine import Engine\nfrom wanlora.training.trackers import Trackers\n"
        "folder, module = Path(sys.argv[1]), sys.argv[2]\n"
        "engine = Engine.start(RunConfig(device='cpu'), log_with=['tensorboard'], logging_dir=folder)\n"
        "assert module not in sys.modules, 'it is imported too early'\n"
        "Trackers(engine, LoggingConfig(logging_dir=folder), {})\n"
        "assert module in sys.modules, 'it is not needed'\n"
    )
    run_fresh(code, str(tmp_path), module)


def test_a_tracker_that_fails_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LoggingConfig(logging_dir=tmp_path)
    engine = Engine.start(RunConfig(device="cpu"), log_with=["tensorboard"], logging_dir=tmp_path)
    trackers = Trackers(engine, config, {})
    tried: list[int] = []

    def fail(self: Accelerator, values: dict[str, float], step: int) -> None:
        tried.append(step)
        raise OSError("No space left on device")

    monkeypatch.setattr(Accelerator, "log", fail)
    trackers({"loss/current": 1.0}, 1)
    trackers({"loss/current": 1.0}, 2)
    assert tried == [1, 2]
    engine.close()


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({}, []),
        ({"logging_dir": Path("logs")}, ["tensorboard"]),
        ({"logging_dir": Path("logs"), "log_with": "tensorboard"}, ["tensorboard"]),
    ],
)
def test_a_logging_folder_alone_means_tensorboard(settings: dict[str, Any], names: list[str]) -> None:
    assert wanted_trackers(LoggingConfig(**settings)) == names


def test_missing_packages_and_folders_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="needs --logging_dir"):
        wanted_trackers(LoggingConfig(log_with="tensorboard"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        wanted_trackers(LoggingConfig(log_with="wandb"))


def test_tables_of_the_tracker_file_and_the_runs_name_are_handed_on(tmp_path: Path) -> None:
    path = tmp_path / "tracker.toml"
    path.write_text('[wandb]\ngroup = "styles"\n[tensorboard]\nmax_queue = 3\n', encoding="utf-8-sig")
    options = tracker_options(LoggingConfig(log_tracker_config=path, wandb_run_name="first"))
    assert options == {"wandb": {"group": "styles", "name": "first"}, "tensorboard": {"max_queue": 3}}
    path.write_text("[wandb\n")
    with pytest.raises(ConfigError, match=r"tracker\.toml"):
        tracker_options(LoggingConfig(log_tracker_config=path))
