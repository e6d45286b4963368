"""Fixtures of the integration tests."""

import shutil
from pathlib import Path

import pytest

from tests.integration.bench import Bench, furnish
from tests.tiny import TinyWan


@pytest.fixture(scope="session")
def _furnished(tmp_path_factory: pytest.TempPathFactory, tiny_models: TinyWan) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    furnish(folder, tiny_models)
    return folder


@pytest.fixture
def bench(
    _furnished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Bench:
    """A folder of this test's own with everything in it, cached and ready to train, which is also the current one."""
    folder = tmp_path / "bench"
    shutil.copytree(_furnished, folder)
    monkeypatch.chdir(folder)
    return Bench(folder, capsys)
