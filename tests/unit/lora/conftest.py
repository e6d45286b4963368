"""What every test of adapters starts from: nothing has been said on the console yet."""

import pytest

from wanlora.foundation import log as console


@pytest.fixture(autouse=True)
def _fresh_console(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_said", set())
    monkeypatch.setattr(console.log, "propagate", True)
