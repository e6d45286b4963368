"""TOML and JSON files: mistakes are shown with their line and their usual cause."""

from collections.abc import Callable
from pathlib import Path

import pytest

from wanlora.config.dataset import read_datasets
from wanlora.config.toml import BACKSLASH_HINT, read_table
from wanlora.foundation.errors import ConfigError

Write = Callable[[str, str], Path]


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        read_table(path)
    return str(caught.value)


def test_a_backslash_in_double_quotes_is_explained(write: Write) -> None:
    path = write("a.toml", 'a = 1\nb = "C:\\Users\\me"\n')
    assert refusal(path) == f'{path} line 2: invalid hex value\n    b = "C:\\Users\\me"\n    {BACKSLASH_HINT}'


def test_a_backslash_that_is_a_legal_escape_is_found_as_a_control_character(write: Write) -> None:
    path = write("a.toml", '[[datasets]]\nvideo_directory = "C:\\train\\new"\n')
    with pytest.raises(ConfigError) as caught:
        read_datasets(path)
    assert str(caught.value).startswith("a.toml line 2: [[datasets]] 1: video_directory is a path with a control char")
    assert BACKSLASH_HINT in str(caught.value)


@pytest.mark.parametrize(
    ("text", "line", "shown"),
    [
        ("a = 1\nb = True\n", 2, "b = True"),
        ("a = 1\n\nc = .txt", 3, "c = .txt"),
        ("a = 1\na = 2\n", 2, "a = 2"),
        ("[x]\na = 1\n[x]\n", 3, "[x]"),
    ],
)
def test_a_syntax_error_shows_its_line(write: Write, text: str, line: int, shown: str) -> None:
    path = write("a.toml", text)
    message = refusal(path)
    assert message.startswith(f"{path} line {line}: ") and message.endswith(f"\n    {shown}")
    assert BACKSLASH_HINT not in message


def test_a_file_that_ends_too_early_is_an_error_at_its_end(write: Write) -> None:
    assert "end of" in refusal(write("a.toml", "a = [1,"))


def test_json_mistakes_have_a_line_and_keys_stand_once(write: Write) -> None:
    path = write("a.json", '{\n "a": 1,\n "b": C\n}')
    assert refusal(path).startswith(f"{path} line 3: Expecting value\n    ")
    assert "'a' is given twice" in refusal(write("b.json", '{"a": 1, "a": 2}'))
    assert "use forward slashes or two backslashes" in refusal(write("c.json", '{"a": "C:\\Users"}'))
    assert "must hold a table, not list" in refusal(write("d.json", "[]"))


def test_files_that_cannot_be_read(write: Write, tmp_path: Path) -> None:
    assert "there is no such file" in refusal(tmp_path / "missing.toml")
    assert "must be .toml or .json" in refusal(write("a.yaml", "a: 1"))
    assert "cannot be read" in refusal(tmp_path)
    latin = tmp_path / "latin.toml"
    latin.write_bytes('a = "ü"'.encode("latin-1"))
    assert "is not UTF-8 text (byte 5); save it as UTF-8" in refusal(latin)


def test_the_place_of_a_key_is_found_in_its_own_table(write: Write) -> None:
    text = 'k = 0\n[general]\nk = 1\n[[datasets]]\n# k = 5\n"k" = 2\n[[ datasets ]] # second\nj = 1\n  k = 3\n'
    file = read_table(write("a.toml", text))
    places = [
        file.where("k"),
        file.where("k", "general"),
        file.where("k", "datasets", 1),
        file.where("k", "datasets", 2),
    ]
    assert places == ["a.toml line 1", "a.toml line 3", "a.toml line 6", "a.toml line 9"]
    assert file.where("missing", "datasets", 2) == "a.toml"
    assert read_table(write("a.json", '{"k": 1}')).where("k") == "a.json"
