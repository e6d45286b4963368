"""Kinds of values: what a setting may hold, read off its annotation, and how a text or a file's value becomes one.

`Count | None` declares a whole number from 1 on that may be left out. A word from the command line comes in through
`from_text`, a value from a TOML file through `from_value`; the same bounds and choices hold for both. In files a text
is never taken for a number nor a number for a switch; only a whole number may stand where any number is wanted.
"""

import dataclasses
import functools
import math
import re
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from wanlora.config.toml import BACKSLASH_HINT
from wanlora.config.values import ratio_or_steps
from wanlora.foundation.errors import did_you_mean

_NUMBERS: dict[Any, str] = {int: "a whole number", float: "a number"}


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of a number; `above` and `below` exclude the bound itself."""

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None

    def __str__(self) -> str:
        parts = [
            f"at least {self.low:g}" if self.low is not None else "",
            f"above {self.above:g}" if self.above is not None else "",
            f"at most {self.high:g}" if self.high is not None else "",
            f"below {self.below:g}" if self.below is not None else "",
        ]
        return " and ".join(part for part in parts if part)

    def admit(self, value: float) -> bool:
        """Whether `value` lies within."""
        return (
            (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )


@dataclasses.dataclass(frozen=True, slots=True)
class OpenChoice:
    """Names outside the known ones that are let through because something else than a registry may own them."""

    pattern: str
    """A whole-name regular expression."""
    description: str
    """The same in words, for messages: `a class of torch.optim`."""


@dataclasses.dataclass(frozen=True, slots=True)
class InputPath:
    """Marks a path that must exist before the run starts."""


class StepsOrShare:
    """Marks a number of steps, or a share of all steps (0.1 or 10%)."""


Count = Annotated[int, Limits(low=1)]
CountOrZero = Annotated[int, Limits(low=0)]
Positive = Annotated[float, Limits(above=0)]
NotNegative = Annotated[float, Limits(low=0)]
Share = Annotated[float, Limits(low=0, below=1)]
Portion = Annotated[float, Limits(low=0, high=1)]
Timestep = Annotated[int, Limits(low=0, high=1000)]
Steps = Annotated[int | float, StepsOrShare()]
ExistingPath = Annotated[Path, InputPath()]
OptimizerName = Annotated[
    str, OpenChoice(r"[A-Z]\w*|[A-Za-z_]\w*(\.\w+)+", "a class of torch.optim or a dotted path (package.Class)")
]
DtypeName = Literal["float32", "fp32", "float", "bfloat16", "bf16", "float16", "fp16"]


@dataclasses.dataclass(frozen=True, slots=True)
class Kind:
    """What values a setting takes."""

    base: Any = None
    """bool, int, float, str, Path, or None where only `words` are allowed."""
    words: tuple[str, ...] = ()
    """Literal texts."""
    limits: Limits | None = None
    open_choice: OpenChoice | None = None
    optional: bool = False
    many: bool = False
    """A list of any length; `length` fixes it."""
    length: int | None = None
    steps_or_share: bool = False
    input_path: bool = False

    @property
    def metavar(self) -> str:
        """How help shows a value: `{a,b}` or `int`."""
        words = "{" + ",".join(self.words) + "}" if self.words else ""
        base = "" if self.base is None or (self.base is str and words) else self.base.__name__.lower()
        return "|".join(part for part in ("steps|share" if self.steps_or_share else base, words) if part)

    @property
    def _expected(self) -> str:
        parts = [_NUMBERS.get(self.base, "" if self.words else "a text in quotes")]
        parts += ["one of " + ", ".join(self.words)] if self.words else []
        return " or ".join(part for part in parts if part)

    def from_text(self, text: str) -> Any:
        """One typed word as a value. Raises `ValueError` with the rest of a sentence (`must be ...`)."""
        if self.words and (text in self.words or self.base is None):
            return self._word(text)
        if self.steps_or_share:
            return self._bounded(ratio_or_steps(text))
        if self.base in _NUMBERS:
            return self._bounded(self._number(text))
        return self._text(text)

    def from_value(self, value: Any) -> Any:
        """A value from a TOML or JSON file, checked. Raises `ValueError` with the rest of a sentence."""
        if self.many:
            if not isinstance(value, (list, tuple)):
                raise ValueError(f"must be a list, got {value!r}: write [{value!r}]")
            if self.length is not None and len(value) != self.length:
                raise ValueError(f"must have {self.length} values, got {len(value)}")
            single = dataclasses.replace(self, many=False, length=None)
            return tuple(single.from_value(item) for item in value)
        if isinstance(value, bool) and self.base is not bool and str(value).lower() in self.words:
            value = str(value).lower()
        if isinstance(value, str):
            if (self.base in _NUMBERS and value not in self.words) and not self.steps_or_share:
                hint = ": write it without quotes" if _is_number(value) else ""
                raise ValueError(f"must be {self._expected}, got the text {value!r}{hint}")
            if self.base is bool:
                raise ValueError(f"must be true or false, got the text {value!r}: write it without quotes")
            return self.from_text(value)
        return self._plain(value)

    def _plain(self, value: Any) -> Any:
        if self.base is bool:
            if isinstance(value, bool):
                return value
            raise ValueError(f"must be true or false, got {value!r}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or self.base not in _NUMBERS:
            raise ValueError(f"must be {self._expected}, got {_toml(value)}")
        if self.steps_or_share:
            return self._bounded(ratio_or_steps(value))
        if self.base is int and isinstance(value, float):
            hint = f": write {int(value)}" if value.is_integer() else ""
            raise ValueError(f"must be a whole number, got {value!r}{hint}")
        return self._bounded(self.base(value))

    def _word(self, text: str) -> str:
        if text not in self.words:
            raise ValueError(f"must be one of {', '.join(self.words)}, got {text!r}{did_you_mean(text, self.words)}")
        return text

    def _number(self, text: str) -> float:
        try:
            return self.base(text)
        except (ValueError, OverflowError):
            raise ValueError(f"must be {self._expected}, got {text!r}") from None

    def _text(self, text: str) -> Any:
        if self.base is Path:
            return _path(text)
        if self.words and not self._known(text):
            other = f" or {self.open_choice.description}" if self.open_choice else ""
            near = did_you_mean(text, self.words)
            raise ValueError(f"must be one of {', '.join(self.words)}{other}, got {text!r}{near}")
        return text

    def _known(self, text: str) -> bool:
        if self.open_choice is None:
            return text in self.words
        return text.lower() in self.words or re.fullmatch(self.open_choice.pattern, text) is not None

    def _bounded(self, value: float) -> float:
        if not math.isfinite(value):
            raise ValueError(f"must be a finite number, got {value}")
        if self.steps_or_share and (value < 0 or (isinstance(value, float) and value > 1)):
            raise ValueError(f"must be a whole number of steps or a share from 0 to 1, got {value:g}")
        if self.limits is not None and not self.limits.admit(value):
            raise ValueError(f"must be {self.limits}, got {value:g}")
        return value


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _path(text: str) -> Path:
    if not text.strip():
        raise ValueError("must be a path, got an empty text")
    if re.search(r"[\x00-\x1f\x7f]", text):
        raise ValueError(f"is a path with a control character, got {text!r}: {BACKSLASH_HINT}")
    return Path(text)


def kind_of(hint: Any) -> Kind:
    """The kind that an annotation declares."""
    origin = get_origin(hint)
    if origin is Annotated:
        inner, *marks = get_args(hint)
        return functools.reduce(_marked, marks, kind_of(inner))
    if origin is Literal:
        return Kind(words=tuple(str(word) for word in get_args(hint)))
    if origin is tuple:
        items = get_args(hint)
        length = None if items[-1] is Ellipsis else len(items)
        return dataclasses.replace(kind_of(items[0]), many=True, length=length)
    if origin in (Union, UnionType):
        kinds = [kind_of(item) for item in get_args(hint) if item is not NoneType]
        merged = functools.reduce(_merged, kinds)
        return dataclasses.replace(merged, optional=NoneType in get_args(hint))
    return Kind(base=hint)


def _marked(kind: Kind, mark: Any) -> Kind:
    match mark:
        case Limits():
            return dataclasses.replace(kind, limits=mark)
        case OpenChoice():
            return dataclasses.replace(kind, open_choice=mark)
        case InputPath():
            return dataclasses.replace(kind, input_path=True)
        case StepsOrShare():
            return dataclasses.replace(kind, base=float, steps_or_share=True)
    raise TypeError(f"unknown mark {mark!r} on a setting")


def _merged(left: Kind, right: Kind) -> Kind:
    """A union: one base type and any literal words."""
    typed, worded = (left, right) if left.base is not None else (right, left)
    return dataclasses.replace(typed, words=left.words + right.words, limits=typed.limits or worded.limits)
