"""Small languages inside flags: `key=value` lists and "steps or share"."""

import ast
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from wanlora.foundation.errors import ConfigError, Problems, did_you_mean
from wanlora.foundation.log import say_once


def ratio_or_steps(value: str | float) -> int | float:
    """A whole number from 1 on is a number of steps (int); anything else, and anything with %, is a share (float).

    Raises `ValueError` with the rest of a sentence for a text that is no number.
    """
    if isinstance(value, str):
        text = value.strip()
        try:
            if text.endswith("%"):
                return float(text[:-1]) / 100
            value = float(text)
        except ValueError:
            raise ValueError(f"must be a number of steps, a share such as 0.1, or 10%, got {text!r}") from None
    if value >= 1 and float(value).is_integer():
        return int(value)
    return float(value)


def parse_key_values(items: Iterable[str], where: str) -> dict[str, Any]:
    """`("betas=0.9,0.99", "decouple=True")` as a dict; values are Python literals, bare words stay text.

    `where` is the flag, for messages. Raises `ConfigError` listing every item that is not `key=value`.
    """
    problems = Problems()
    parsed = read_key_values(items, where, problems)
    problems.raise_all()
    return parsed


def read_key_values(items: Iterable[str], where: str, problems: Problems) -> dict[str, Any]:
    """The same; what is wrong is added to `problems`."""
    parsed: dict[str, Any] = {}
    for item in items:
        key, equals, text = (part.strip() for part in item.partition("="))
        if not equals or not key.isidentifier() or not text:
            problems.add(f"{where}: {item!r} is not key=value (for example weight_decay=0.01)")
        elif key in parsed:
            problems.add(f"{where}: {key} is given twice")
        else:
            with problems.collect():
                parsed[key] = _literal(text, f"{where}: {item!r}")
    return parsed


def _literal(text: str, where: str) -> Any:
    """Python's reading of `text` where there is one."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError):
        pass
    if "=" in text:
        raise ConfigError(f"{where} has two '=': give each key=value its own place, separated by a space")
    if text[0] in "[({'\"":
        raise ConfigError(f"{where} is not a Python value; a list is written ['a','b'] and the whole item quoted once")
    return text


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkArgs:
    """`--network_args` for networks.lora_wan."""

    exclude_patterns: tuple[str, ...] = ()
    """Regular expressions; a module whose path begins with a match of one is not trained."""
    include_patterns: tuple[str, ...] = ()
    """Regular expressions; if given, only modules whose path begins with a match of one are trained."""
    rank_dropout: float | None = None
    """Probability that a rank is dropped for a sample."""
    module_dropout: float | None = None
    """Probability that an adapter is skipped for a step."""
    loraplus_lr_ratio: float | None = None
    """Learning rate of lora_up relative to the learning rate (LoRA+)."""
    verbose: bool = False
    """List the modules that are trained."""


_NO_CONV = ("conv_dim", "conv_alpha")
_NETWORK_KEYS = (*NetworkArgs.__dataclass_fields__, *_NO_CONV)


def parse_network_args(items: Iterable[str]) -> NetworkArgs:
    """`--network_args` read and checked. Raises `ConfigError` listing every unknown key and every bad value."""
    problems = Problems()
    parsed = read_network_args(items, problems)
    problems.raise_all()
    return parsed


def read_network_args(items: Iterable[str], problems: Problems) -> NetworkArgs:
    """The same; what is wrong is added to `problems`."""
    where = "--network_args"
    values: dict[str, Any] = {}
    for key, value in read_key_values(items, where, problems).items():
        if key not in _NETWORK_KEYS:
            known = ", ".join(_NETWORK_KEYS)
            problems.add(f"{where}: unknown key {key!r}{did_you_mean(key, _NETWORK_KEYS)}; known: {known}")
        elif key in _NO_CONV:
            say_once(f"{where}: {key} changes nothing: Wan's blocks have no convolutions")
        else:
            with problems.collect():
                values[key] = _network_value(key, value)
    return NetworkArgs(**values)


def _network_value(key: str, value: Any) -> Any:
    where = f"--network_args: {key}"
    if key.endswith("_patterns"):
        return _patterns(value, where)
    if key == "verbose":
        if isinstance(value, (bool, int)):
            return bool(value)
        raise ConfigError(f"{where} must be True or False, got {value!r}")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{where} must be a number, got {value!r}")
    if key == "loraplus_lr_ratio" and value <= 0:
        raise ConfigError(f"{where} must be above 0, got {value:g}")
    if key.endswith("_dropout") and not 0 <= value < 1:
        raise ConfigError(f"{where} must be at least 0 and below 1, got {value:g}")
    return float(value)


def _patterns(value: Any, where: str) -> tuple[str, ...]:
    patterns = (value,) if isinstance(value, str) else value
    if not isinstance(patterns, (list, tuple)) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ConfigError(f"{where} must be a list of regular expressions, for example \"['.*ffn.*']\", got {value!r}")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"{where}: {pattern!r} is not a regular expression: {error}") from None
    return tuple(patterns)
