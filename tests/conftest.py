"""Fixtures that tests of every room may use. What a session fixture gives is shared: copy it before changing it."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.runs import TrainingFolder, make_training_data, widen
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


@pytest.fixture(scope="session")
def _training_media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    make_training_data(folder)
    return folder


@pytest.fixture(scope="session")
def _float32_models(tiny_models: TinyWan) -> TinyWan:
    """The same, with a transformer in float32."""
    return replace(tiny_models, dit=widen(tiny_models.dit, tiny_models.dit.with_stem("wan_tiny_t2v_fp32")))


@pytest.fixture
def training_folder(
    _training_media: Path, _float32_models: TinyWan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> TrainingFolder:
    """A folder of this test's own in which everything is cached and the trainer can start."""
    folder = tmp_path / "training"
    shutil.copytree(_training_media, folder)
    toml = folder / "dataset.toml"
    toml.write_text(toml.read_text().replace(_training_media.as_posix(), folder.as_posix()))
    return TrainingFolder(folder=folder, models=_float32_models, capture=capsys)
