"""docs/options.md, written from the same declarations that the scripts read."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING
from types import MappingProxyType

from wanlora.config.arguments import CONFIG_FILE_HELP, Command
from wanlora.config.dataset import GENERAL_KEYS, DatasetConfig, ImageDatasetConfig, VideoDatasetConfig
from wanlora.config.fields import Setting, settings_of
from wanlora.config.flags import LATENT_CACHE, TEXT_CACHE, train_command
from wanlora.config.planning import PlanningConfig
from wanlora.config.prompts import OPTIONS, SamplePrompt

_HEAD = """# Options

This page is generated from the declarations that the programs read, so it cannot fall behind them.

A switch `--x` is turned off by `--no_x`, which is how a command line overrides a `--config_file`. A unique beginning of
one of musubi's flags is accepted and printed in full; flags that are new in wanlora are typed whole.
"""


def options_markdown(choices: Mapping[str, Sequence[str]] = MappingProxyType({})) -> str:
    """The page: dataset keys, the three scripts' flags, prompt options. `choices` as for `parse_train`."""
    parts = [
        _HEAD,
        _dataset_keys(),
        *(_command(command) for command in (LATENT_CACHE, TEXT_CACHE, train_command(choices))),
        "## wanlora plan\n\nEvery flag of `wan_train_network.py`, and:\n",
        _table(settings_of(PlanningConfig), "flag"),
        _prompt_options(),
    ]
    return "\n".join(parts)


def _dataset_keys() -> str:
    common = [setting for setting in settings_of(DatasetConfig) if setting.name != "where"]
    general = [setting for setting in common if setting.name in GENERAL_KEYS]
    rest = [setting for setting in common if setting.name not in GENERAL_KEYS]
    own = {
        cls: [setting for setting in settings_of(cls) if setting not in settings_of(DatasetConfig)]
        for cls in (ImageDatasetConfig, VideoDatasetConfig)
    }
    return "\n".join(
        [
            "## Dataset file\n",
            "A `[[validation]]` takes the keys of a `[[datasets]]`, except `num_repeats`.\n",
            "In `[general]`, for all, or in a `[[datasets]]`:\n",
            _table(general, "key"),
            "In every `[[datasets]]`:\n",
            _table(rest, "key"),
            "In a `[[datasets]]` of pictures:\n",
            _table(own[ImageDatasetConfig], "key"),
            "In a `[[datasets]]` of clips:\n",
            _table(own[VideoDatasetConfig], "key"),
        ]
    )


def _command(command: Command) -> str:
    parts = [f"## {command.script}\n"]
    if command.config_file:
        parts.append(f"`--config_file PATH`: {CONFIG_FILE_HELP}\n")
    for title, settings in command.groups.items():
        parts += [f"### {title}\n"] if len(command.groups) > 1 else []
        parts.append(_table(settings, "flag"))
    if command.answered:
        parts += ["Flags of musubi's that have another answer here:\n", "| flag | answer |", "|---|---|"]
        parts += [
            f"| `--{name}` | {'refused' if answer.refused else 'not needed'}: {_cell(answer.sentence)} |"
            for name, answer in command.answered.items()
        ]
        parts.append("")
    return "\n".join(parts)


def _prompt_options() -> str:
    keys = {setting.name: setting for setting in settings_of(SamplePrompt)}
    rows = [
        f"| `--{option}` | `{key}` | {_default(keys[key])} | {_cell(keys[key].help)} |"
        for option, key in OPTIONS.items()
    ]
    head = "## Prompt file\n\nOptions behind the prompt in `.txt`, keys in `.toml` and `.json`:\n"
    return "\n".join([head, "| option | key | default | meaning |", "|---|---|---|---|", *rows, ""])


def _table(settings: Sequence[Setting], what: str) -> str:
    dashes = "--" if what == "flag" else ""
    rows = [
        f"| `{dashes}{setting.name}` | {_type(setting, what)} | {_default(setting)} | {_cell(setting.help)} |"
        for setting in settings
    ]
    return "\n".join([f"| {what} | type | default | meaning |", "|---|---|---|---|", *rows, ""])


def _type(setting: Setting, what: str) -> str:
    kind = setting.kind
    if setting.is_switch:
        return "switch" if what == "flag" else "true or false"
    base = "steps or share" if kind.steps_or_share else kind.metavar.partition("{")[0].strip("|")
    limits = f" ({kind.limits})" if kind.limits else ""
    words = [*kind.words, kind.open_choice.description] if kind.words and kind.open_choice else kind.words
    single = " or ".join(part for part in (base + limits, ", ".join(words)) if part)
    if kind.many:
        return f"list of {single}" if kind.length is None else f"{kind.length} x {single}"
    return single


def _default(setting: Setting) -> str:
    default = setting.default
    if default in (None, (), MISSING):
        return ""
    if isinstance(default, bool):
        return str(default).lower()
    return f"`{list(default) if isinstance(default, tuple) else default}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
