"""Command lines: argparse built from the settings, musubi's abbreviations, and a value for every flag.

argparse only cuts the line into flags and words and prints `--help`. Abbreviations are expanded before it (a unique
beginning of one of musubi's flags; our own are typed whole, so that a new flag never breaks a script), and words become
values after it, by the same checks that values from files pass: so one run reports everything that is wrong.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, replace
from decimal import Decimal
from functools import cached_property
from typing import Any

from wanlora.config.fields import Setting, groups_of, settings_of
from wanlora.config.musubi import ANSWERED_FLAGS, MEANS_DEFAULT, MUSUBI_FLAGS, Answer
from wanlora.foundation.errors import ConfigError, Problems, did_you_mean
from wanlora.foundation.log import log, say_once

_TINY = re.compile(r"-\d*\.?\d+[eE][-+]?\d+")
"""Negative numbers that argparse would take for flags."""
_CONTINUATIONS = ("^", "\\", "`")
CONFIG_FILE_HELP = "TOML with any of these flags as keys (.toml may be left out); the command line wins."


@dataclass(frozen=True)
class Command:
    """The flags of one script."""

    script: str
    config_class: type
    choices: Mapping[str, Sequence[str]]
    """Names that registries know, by setting."""
    refusals: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Values that users may know from elsewhere and that cannot be had here: why, by setting and value."""
    config_file: bool = False
    """Whether `--config_file` may hold the flags."""
    program: str | None = None
    """What the user types, if it is not the script."""

    @cached_property
    def groups(self) -> dict[str, tuple[Setting, ...]]:
        """Settings by title of their group."""
        classes = groups_of(self.config_class).values() or (self.config_class,)
        return {_first_line(cls): tuple(self._with_choices(setting) for setting in settings_of(cls)) for cls in classes}

    @cached_property
    def settings(self) -> dict[str, Setting]:
        """Every setting by name."""
        return {setting.name: setting for group in self.groups.values() for setting in group}

    @cached_property
    def negations(self) -> dict[str, str]:
        """`no_sdpa` -> `sdpa`, for every switch."""
        return {f"no_{name}": name for name, setting in self.settings.items() if setting.is_switch}

    @cached_property
    def answered(self) -> dict[str, Answer]:
        """musubi's flags that have no setting here."""
        return {name: ANSWERED_FLAGS[name] for name in MUSUBI_FLAGS[self.script] if name in ANSWERED_FLAGS}

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Everything that may be typed after two dashes."""
        extra = ("help", "config_file") if self.config_file else ("help",)
        return (*self.settings, *self.negations, *self.answered, *extra)

    def refusal(self, setting: Setting, value: Any) -> str:
        """The end of a sentence on a value that is known and refused; empty for any other."""
        why = self.refusals.get(setting.name, {}).get(value) if isinstance(value, str) else None
        return f"{value}: {why}; choose from {', '.join(setting.kind.words)}" if why else ""

    def _with_choices(self, setting: Setting) -> Setting:
        words = tuple(self.choices.get(setting.name, ()))
        return replace(setting, kind=replace(setting.kind, words=words)) if words else setting


def _first_line(cls: type) -> str:
    return (cls.__doc__ or "").partition("\n")[0].rstrip(".")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ConfigError(message.removeprefix("argument "))


class _Switch(argparse.Action):
    """`--x` stores True, `--no_x` False."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        setattr(namespace, self.dest, option == f"--{self.dest}")


def make_parser(command: Command) -> argparse.ArgumentParser:
    """The argparse parser: words stay text, flags that are not typed leave nothing behind."""
    parser = _Parser(
        prog=command.program or command.script,
        description=_first_line(command.config_class),
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    if command.config_file:
        parser.add_argument("--config_file", metavar="PATH", help=CONFIG_FILE_HELP)
    for title, settings in command.groups.items():
        group = parser.add_argument_group(title)
        for setting in settings:
            _add(group, setting)
    for name, answer in command.answered.items():
        nargs = 0 if answer.is_switch else None
        action = _Switch if answer.is_switch else "store"
        parser.add_argument(f"--{name}", action=action, nargs=nargs, help=argparse.SUPPRESS)
    return parser


def _add(group: Any, setting: Setting) -> None:
    text = described(setting).replace("%", "%%")
    if setting.is_switch:
        group.add_argument(f"--{setting.name}", f"--no_{setting.name}", action=_Switch, nargs=0, help=text)
    else:
        nargs = "*" if setting.kind.many else None
        group.add_argument(f"--{setting.name}", nargs=nargs, metavar=setting.kind.metavar, help=text)


def described(setting: Setting) -> str:
    """The help of a setting with its default, where the help does not name it."""
    default = setting.default
    if default in (None, (), MISSING) or setting.is_switch or "Default:" in setting.help:
        return setting.help
    return f"{setting.help} Default: {default}."


def read_arguments(command: Command, argv: Sequence[str], problems: Problems) -> dict[str, Any]:
    """The value of every flag that is typed (`--config_file` as text); what is wrong is added to `problems`.

    A flag whose value is wrong is in the answer as None, so that nothing later calls it missing.
    """
    words = _expanded(command, argv, problems)
    typed, rest = argparse.Namespace(), list[str]()
    with problems.collect():
        typed, rest = make_parser(command).parse_known_args(words)
    if not vars(typed):
        problems.raise_all()
    for word in rest:
        problems.add(_stray(word))
    values: dict[str, Any] = {}
    for name, raw in vars(typed).items():
        if name in command.answered:
            answer(f"--{name}", command.answered[name], problems)
        elif name == "config_file" or command.settings[name].is_switch:
            values[name] = raw
        elif (name, raw) != MEANS_DEFAULT:
            values[name] = _value(command, command.settings[name], raw, problems)
    return values


def _value(command: Command, setting: Setting, raw: str | list[str], problems: Problems) -> Any:
    try:
        if isinstance(raw, list):
            return tuple(setting.kind.from_text(word) for word in raw)
        return setting.kind.from_text(raw)
    except ValueError as error:
        problems.add(f"--{setting.name} {command.refusal(setting, raw) or error}")
        return None


def answer(what: str, found: Answer, problems: Problems) -> None:
    """Refuse or acknowledge a name of musubi's that has no setting here."""
    if found.refused:
        problems.add(f"{what}: {found.sentence}")
    else:
        say_once(f"{what} is not needed: {found.sentence}")


def _expanded(command: Command, argv: Sequence[str], problems: Problems) -> list[str]:
    """`argv` with abbreviated flags written out; unknown ones go to `problems`, and their values go too."""
    words: list[str] = []
    wanted = True
    for word in argv:
        if word[:1] in ("–", "—"):
            problems.add(f"{word!r} begins with a long dash; type two hyphens: --{word.lstrip('–—-')}")
            wanted = False
        elif word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            flag = _full_name(command, name, problems)
            wanted = flag is not None
            words += [f"--{flag}{equals}{value}"] if wanted else []
        elif wanted:
            words.append(format(Decimal(word), "f") if _TINY.fullmatch(word) else word)
    return words


def _full_name(command: Command, name: str, problems: Problems) -> str | None:
    """The flag that `name` is, or is the unique beginning of."""
    if name in command.names:
        return name
    fits = [flag for flag in MUSUBI_FLAGS[command.script] if flag.startswith(name)]
    if len(fits) == 1:
        log.info(f"--{name} is read as --{fits[0]}")
        return fits[0]
    if fits:
        problems.add(f"--{name} is ambiguous: it could be {', '.join(f'--{flag}' for flag in fits)}")
    else:
        problems.add(f"unknown flag --{name}{did_you_mean(f'--{name}', [f'--{flag}' for flag in command.names])}")
    return None


def _stray(word: str) -> str:
    if word in _CONTINUATIONS:
        return f"{word!r} continues a line only as its very last character; remove what follows it, blanks included"
    if word.startswith("-"):
        return f"unknown flag {word}; flags begin with two dashes"
    return f"{word!r} belongs to no flag; a value with spaces needs quotes"
