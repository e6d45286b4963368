"""From a command line to a config: the door through which the scripts come in.

`--config_file` gives any training flag a value, the command line wins over it, and both pass the same checks.
Everything that is wrong is reported at once, before anything is loaded.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from wanlora.config.arguments import Command, answer, read_arguments
from wanlora.config.caching import LatentCacheConfig, TextCacheConfig
from wanlora.config.checks import check_latent_cache, check_paths, check_text_cache, check_train
from wanlora.config.dataset import ImageDatasetConfig, VideoDatasetConfig, dataset_kinds
from wanlora.config.fields import groups_of, settings_of
from wanlora.config.musubi import MEANS_DEFAULT
from wanlora.config.planning import PlannedConfig
from wanlora.config.toml import TableFile, read_table
from wanlora.config.train import TrainConfig
from wanlora.foundation.errors import Problems, did_you_mean

Choices = Mapping[str, Sequence[str]]
Refusals = Mapping[str, Mapping[str, str]]
Run = TypeVar("Run", bound=TrainConfig)

LATENT_CACHE = Command(script="wan_cache_latents.py", config_class=LatentCacheConfig, choices={})
TEXT_CACHE = Command(script="wan_cache_text_encoder_outputs.py", config_class=TextCacheConfig, choices={})


def train_command(choices: Choices, refusals: Refusals = MappingProxyType({})) -> Command:
    """The training script's flags; `choices` are the names that registries know (task, timestep_sampling, ...)."""
    return Command(
        script="wan_train_network.py", config_class=TrainConfig, choices=choices, refusals=refusals, config_file=True
    )


def plan_command(choices: Choices, refusals: Refusals = MappingProxyType({})) -> Command:
    """The flags of `wanlora plan`: the training script's and its own."""
    return Command(
        script="wan_train_network.py",
        program="wanlora plan",
        config_class=PlannedConfig,
        choices=choices,
        refusals=refusals,
        config_file=True,
    )


def parse_latent_cache(argv: Sequence[str]) -> LatentCacheConfig:
    """The command line of wan_cache_latents.py. Raises `ConfigError` listing everything that is wrong."""
    problems = Problems()
    values = read_arguments(LATENT_CACHE, argv, problems)
    config = LatentCacheConfig(**_right(values))
    check_latent_cache(config, values.keys(), problems)
    _raise_all(config, problems)
    return config


def parse_text_cache(argv: Sequence[str]) -> TextCacheConfig:
    """The command line of wan_cache_text_encoder_outputs.py. Raises `ConfigError` listing everything that is wrong."""
    problems = Problems()
    values = read_arguments(TEXT_CACHE, argv, problems)
    config = TextCacheConfig(**_right(values))
    check_text_cache(config, values.keys(), problems)
    _raise_all(config, problems)
    return config


def parse_train(argv: Sequence[str], choices: Choices, refusals: Refusals = MappingProxyType({})) -> TrainConfig:
    """The command line of wan_train_network.py. Raises `ConfigError` listing everything that is wrong.

    `choices` are the names that registries know, by flag: task, timestep_sampling, sample_solver, ...; a flag that is
    not in it takes any name. `refusals` are values that users may know and that cannot be had, with the reason.
    """
    return _parse_run(train_command(choices, refusals), TrainConfig, argv)


def parse_plan(argv: Sequence[str], choices: Choices, refusals: Refusals = MappingProxyType({})) -> PlannedConfig:
    """The command line of `wanlora plan`: as `parse_train`, with a few flags more."""
    return _parse_run(plan_command(choices, refusals), PlannedConfig, argv)


def _parse_run(command: Command, config_class: type[Run], argv: Sequence[str]) -> Run:
    problems = Problems()
    values = read_arguments(command, argv, problems)
    if file := values.pop("config_file", None):
        with problems.collect():
            values = {**_read_config_file(command, Path(file), problems), **values}
    config = _run_config(config_class, _right(values), problems)
    check_train(config, values.keys(), problems)
    _raise_all(config, problems)
    return config


def _raise_all(config: Any, problems: Problems) -> None:
    """Raise if something is wrong; files that are not there are then named as well."""
    if problems:
        with problems.collect():
            check_paths(config)
    problems.raise_all()


def _right(values: dict[str, Any]) -> dict[str, Any]:
    """Without the values that were wrong."""
    return {name: value for name, value in values.items() if value is not None}


def _run_config(config_class: type[Run], values: dict[str, Any], problems: Problems) -> Run:
    groups: dict[str, Any] = {}
    for group, cls in groups_of(config_class).items():
        with problems.collect():
            groups[group] = cls(
                **{setting.name: values[setting.name] for setting in settings_of(cls) if setting.name in values}
            )
    return config_class(**groups)


def _read_config_file(command: Command, path: Path, problems: Problems) -> dict[str, Any]:
    """The values of a `--config_file`; what is wrong is added to `problems`."""
    if not path.name.lower().endswith(".toml"):
        path = path.with_name(path.name + ".toml")
    file = read_table(path)
    values: dict[str, Any] = {}
    homes: dict[str, str] = {}
    for section, key, value in _flattened(file, problems):
        where = f"{file.where(key, section)}: {key}"
        if key in homes:
            problems.add(f"{where} is given twice, {homes[key]} and in [{section}]")
            continue
        homes[key] = f"in [{section}]" if section else "at the top"
        name = command.negations.get(key, key)
        if key in command.answered:
            if value and value != "NO":
                answer(where, command.answered[key], problems)
        elif name not in command.settings:
            problems.add(f"{where}: {_unknown(command, key)}")
        elif (name, value) != MEANS_DEFAULT:
            values[name] = _file_value(command, key, value, where, problems)
    return values


def _flattened(file: TableFile, problems: Problems) -> Iterator[tuple[str, str, Any]]:
    """(section, key, value) of the top and of one level of sections, whose names mean nothing."""
    for key, value in file.data.items():
        if not isinstance(value, dict):
            yield "", key, value
            continue
        for inner, item in value.items():
            if isinstance(item, dict):
                problems.add(f"{file.path.name}: [{key}.{inner}] lies too deep; sections have one level")
            else:
                yield key, inner, item


def _file_value(command: Command, key: str, value: Any, where: str, problems: Problems) -> Any:
    name = command.negations.get(key, key)
    try:
        typed = command.settings[name].kind.from_value(value)
    except ValueError as error:
        problems.add(f"{where} {command.refusal(command.settings[name], value) or error}")
        return None
    return not typed if key != name else typed


def _unknown(command: Command, key: str) -> str:
    if key in dataset_kinds(VideoDatasetConfig) or key in dataset_kinds(ImageDatasetConfig):
        return "belongs in the dataset file"
    return f"unknown key{did_you_mean(key, command.names)}"
