"""Settings as text, and that none of them is accepted and forgotten."""

import ast
from dataclasses import fields
from pathlib import Path

import wanlora
from wanlora.config.outputs import LoggingConfig, SavingConfig
from wanlora.config.train import NetworkConfig, RunConfig, TrainConfig
from wanlora.training.settings import all_settings, decisive_settings, differences, timestep_settings

SOURCE = Path(wanlora.__file__).parent
READERS = ("training/*.py", "cli/*.py", "config/train.py", "config/outputs.py")


def names_read() -> set[str]:
    """Every attribute that the trainer reads of anything."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for pattern in READERS for path in SOURCE.glob(pattern)]
    return {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def names_said_to_have_no_effect() -> set[str]:
    """Every text in the checks of flags, where a flag without effect is named."""
    tree = ast.parse((SOURCE / "config" / "checks.py").read_text(encoding="utf-8"))
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def test_every_setting_is_read_or_said_to_have_no_effect() -> None:
    settings = {leaf.name for group in fields(TrainConfig) for leaf in fields(getattr(TrainConfig(), group.name))}
    handed_on_by_name = set(timestep_settings(TrainConfig().timesteps))
    read_by_the_entry_point = {"debug"}
    assert settings - names_read() - names_said_to_have_no_effect() - handed_on_by_name == read_by_the_entry_point


def test_secrets_are_left_out() -> None:
    config = TrainConfig(logging=LoggingConfig(log_with="wandb", wandb_api_key="geheim", wandb_run_name="first"))
    assert all_settings(config)["wandb_run_name"] == "first"
    assert "geheim" not in str(all_settings(config)) + str(decisive_settings(config))


def test_what_changes_a_step_is_told_from_what_does_not() -> None:
    saved = decisive_settings(TrainConfig())
    harmless = TrainConfig(
        run=RunConfig(max_train_steps=5, max_train_epochs=2, debug=True, seed=3),
        saving=SavingConfig(output_name="other", save_every_n_steps=4, save_precision="bf16"),
    )
    assert differences(saved, decisive_settings(harmless)) == []
    changed = TrainConfig(
        run=RunConfig(gradient_accumulation_steps=4), network=NetworkConfig(network_dropout=0.1, network_alpha=2.0)
    )
    assert differences(saved, decisive_settings(changed)) == [
        "gradient_accumulation_steps: 1 -> 4",
        "network_alpha: 1.0 -> 2.0",
        "network_dropout: None -> 0.1",
    ]


def test_settings_of_another_version_are_named() -> None:
    assert differences({"old": "1"}, {"new": "2"}) == ["new: unset -> 2", "old: 1 -> unset"]
