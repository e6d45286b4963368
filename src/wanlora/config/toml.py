"""Reading TOML and JSON files that users write.

The standard library reads them; what this module adds is that a user finds the place: the file, the line, the line's
text, and the usual cause (a Windows path in double quotes, whose backslashes start escapes).
"""

import json
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wanlora.foundation.errors import ConfigError

BACKSLASH_HINT = "a backslash inside double quotes starts an escape; use 'single quotes' or forward slashes"
_HEADER = re.compile(r"\s*\[\[?\s*([^\[\]]+?)\s*\]\]?\s*(#.*)?$")


@dataclass(frozen=True, slots=True)
class TableFile:
    """What a TOML or JSON file holds, and where in it."""

    path: Path
    data: dict[str, Any]
    text: str

    def where(self, key: str, table: str = "", number: int = 1) -> str:
        """`style.toml line 7`: the place of `key` in the `number`th table called `table` (from 1; "" is the top)."""
        line = None if self.path.suffix.lower() == ".json" else self._line(key, table, number)
        return self.path.name if line is None else f"{self.path.name} line {line}"

    def _line(self, key: str, table: str, number: int) -> int | None:
        current, seen = "", 0
        for index, line in enumerate(self.text.splitlines(), 1):
            if header := _HEADER.match(line):
                current = header.group(1)
                seen += current == table
            elif current == table and (not table or seen == number):
                name = line.partition("=")[0].strip().strip("\"'")
                if "=" in line and name == key:
                    return index
        return None


def read_table(path: Path) -> TableFile:
    """A `.toml` or `.json` file whose top level is a table. Raises `ConfigError` with file, line and cure."""
    text = read_text(path)
    suffix = path.suffix.lower()
    if suffix not in (".toml", ".json"):
        raise ConfigError(f"{path}: the file must be .toml or .json")
    data = _toml(path, text) if suffix == ".toml" else read_json(path, text)
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: the file must hold a table, not {type(data).__name__}")
    return TableFile(path=path, data=data, text=text)


def read_text(path: Path) -> str:
    """A text file in UTF-8, with or without byte order mark, newlines as they stand."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def _toml(path: Path, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = re.search(r"\(at line (\d+), column \d+\)", str(error))
        message = re.sub(r" *\(at [^)]*\)$", "", str(error))
        raise ConfigError(_syntax_error(path, text, message, int(found.group(1)) if found else None)) from None


def _syntax_error(path: Path, text: str, message: str, number: int | None) -> str:
    lines = text.splitlines()
    if number is None or not 1 <= number <= len(lines):
        return f"{path}: {message[0].lower() + message[1:]} at the end of the file"
    line = lines[number - 1].strip()
    hint = f"\n    {BACKSLASH_HINT}" if re.search(r'"[^"]*\\', line) else ""
    return f"{path} line {number}: {message[0].lower() + message[1:]}\n    {line}{hint}"


def read_json(path: Path, text: str) -> Any:
    """JSON in which no key stands twice. Raises `ConfigError` with file and line."""
    try:
        return json.loads(text, object_pairs_hook=lambda pairs: _unique(path, pairs))
    except json.JSONDecodeError as error:
        lines = text.splitlines()
        line = lines[error.lineno - 1].strip() if error.lineno <= len(lines) else ""
        hint = "\n    a backslash starts an escape; use forward slashes or two backslashes" if "\\" in line else ""
        raise ConfigError(f"{path} line {error.lineno}: {error.msg}\n    {line}{hint}") from None


def _unique(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ConfigError(f"{path}: {key!r} is given twice in one table")
        found[key] = value
    return found
