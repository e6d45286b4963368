"""Fixtures that tests of every room may use. What a session fixture gives is shared: copy it before changing it."""

from pathlib import Path

import pytest

from tests.tiny import TinyDataset, TinyWan, copy_dataset, make_tiny_dataset, make_tiny_wan


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> TinyWan:
    """Transformer, VAE, text encoder and tokenizer, as files."""
    return make_tiny_wan(tmp_path_factory.mktemp("tiny_models"))


@pytest.fixture(scope="session")
def _tiny_media(tmp_path_factory: pytest.TempPathFactory) -> TinyDataset:
    return make_tiny_dataset(tmp_path_factory.mktemp("tiny_media"))


@pytest.fixture
def tiny_dataset(_tiny_media: TinyDataset, tmp_path: Path) -> TinyDataset:
    """Pictures, clips, captions, TOML and prompts in a folder of this test's own; nothing is cached."""
    return copy_dataset(_tiny_media, tmp_path / "dataset")
