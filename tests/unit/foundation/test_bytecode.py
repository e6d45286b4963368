"""Starts that compile a library from its text are told apart."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.runs import TrainingFolder
from wanlora.foundation.bytecode import missing_bytecode

Import = Callable[[], ModuleType]


@pytest.fixture
def imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Import:
    """Import a module that was never imported before."""
    (tmp_path / "slow_library.py").write_text("answer = 42\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "pycache_prefix", None)
    monkeypatch.delitem(sys.modules, "slow_library", raising=False)
    return lambda: importlib.import_module("slow_library")


def test_what_python_keeps_needs_no_word(imported: Import, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    assert missing_bytecode(imported()) is None


def test_a_setting_that_makes_every_start_compile_is_named(imported: Import, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    notice = missing_bytecode(imported())
    assert notice is not None
    assert notice.startswith("slow_library was compiled from its text") and "PYTHONDONTWRITEBYTECODE or -B" in notice


def test_a_folder_that_cannot_be_written_is_named(
    imported: Import, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    (tmp_path / "__pycache__").write_text("a file where the folder should be", encoding="utf-8")
    notice = missing_bytecode(imported())
    assert notice is not None
    assert str(tmp_path / "__pycache__") in notice and "PYTHONPYCACHEPREFIX" in notice


def test_a_module_without_a_file_is_never_compiled() -> None:
    assert missing_bytecode(sys) is None


def test_a_run_that_started_so_says_so(
    training_folder: TrainingFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert torch.__spec__ is not None
    monkeypatch.setattr(torch.__spec__, "cached", str(tmp_path / "nowhere" / "torch.pyc"))
    text = training_folder.train(training_folder.arguments("style", "--max_train_steps", "1"))
    assert "torch was compiled from its text, which takes seconds of every start" in text
