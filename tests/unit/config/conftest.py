"""What the program says, as a list."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from wanlora.config import flags
from wanlora.foundation import log as log_module


@pytest.fixture(autouse=True)
def _files_that_are_not_there_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Command lines in these tests name files that exist nowhere; the check has tests of its own."""
    monkeypatch.setattr(flags, "check_paths", lambda config: None)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Every notice of this test, as if the process had said nothing before."""
    messages: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    monkeypatch.setattr(log_module, "_said", set())
    listener, level = Listener(), log_module.log.level
    log_module.log.addHandler(listener)
    log_module.log.setLevel(logging.INFO)
    yield messages
    log_module.log.removeHandler(listener)
    log_module.log.setLevel(level)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], Path]:
    """Writes a text file into the test's folder and gives its path."""

    def written(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_bytes(text.encode("utf-8"))
        return path

    return written
