"""One description of every setting, read off its dataclass field.

A setting is declared once, as a dataclass field: its name is the flag and the TOML key, its annotation says type,
choices and bounds, the string below it is the help. Command line, TOML files, `--help` and docs/options.md all use what
this module reads off that declaration, so they cannot disagree; a value from a file passes the same checks as one that
was typed.
"""

import ast
import dataclasses
import inspect
import textwrap
from pathlib import Path
from typing import Any, get_type_hints

from wanlora.config.kinds import Kind, kind_of
from wanlora.foundation.errors import Problems


@dataclasses.dataclass(frozen=True, slots=True)
class Setting:
    """One field of a config dataclass."""

    name: str
    kind: Kind
    default: Any
    """`dataclasses.MISSING` where the field must be given."""
    help: str

    @property
    def is_switch(self) -> bool:
        """Whether the flag takes no value."""
        return self.kind.base is bool


_SETTINGS: dict[type, tuple[Setting, ...]] = {}


def settings_of(cls: type) -> tuple[Setting, ...]:
    """Every field of a config dataclass, in order of declaration."""
    if cls not in _SETTINGS:
        hints = get_type_hints(cls, include_extras=True)
        texts = _field_docstrings(cls)
        _SETTINGS[cls] = tuple(
            Setting(name=field.name, kind=kind_of(hints[field.name]), default=_default(field), help=texts[field.name])
            for field in dataclasses.fields(cls)
        )
    return _SETTINGS[cls]


def groups_of(cls: type) -> dict[str, type]:
    """The fields of a config dataclass that are config dataclasses themselves."""
    hints: dict[str, type] = get_type_hints(cls)
    return {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}


def check_fields(config: Any) -> None:
    """Every field holds a value of its declared kind. Raises `ConfigError` naming all that do not."""
    problems = Problems()
    for setting in settings_of(type(config)):
        value = getattr(config, setting.name)
        if value is None and setting.kind.optional:
            continue
        try:
            _check(setting.kind, value)
        except ValueError as error:
            problems.add(f"{setting.name} {error}")
    problems.raise_all()


class Checked:
    """A config dataclass whose fields are checked when it is made."""

    __slots__ = ()

    def __post_init__(self) -> None:
        check_fields(self)


def _check(kind: Kind, value: Any) -> None:
    if kind.base is Path:
        values = value if kind.many else (value,)
        if not all(isinstance(item, Path) for item in values):
            raise ValueError(f"must be a path, got {value!r}")
        value = [str(item) for item in values] if kind.many else str(value)
    kind.from_value(value)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _field_docstrings(cls: type) -> dict[str, str]:
    """The string literal below each annotated field, inherited fields included."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            definition = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
            assert isinstance(definition, ast.ClassDef)
            for field, text in zip(definition.body, definition.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                    match text:
                        case ast.Expr(value=ast.Constant(value=str(words))):
                            found[field.target.id] = " ".join(words.split())
    return found
