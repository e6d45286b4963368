"""The tiny Wan that is shipped: small, complete, in the package, and copied whole."""

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from wanlora.foundation.errors import CheckpointError
from wanlora.foundation.tensor_files import open_tensors
from wanlora.models.wan.checkpoint import check_task, inspect_transformer
from wanlora.quickstart import shipped
from wanlora.quickstart.shipped import PRETRAINED, copy_pretrained

ROOT = Path(__file__).parents[3]


def test_all_files_together_are_below_ten_megabytes() -> None:
    files = [path for path in PRETRAINED.dit.parent.rglob("*") if path.is_file()]
    assert set(PRETRAINED.paths) <= set(files)
    assert sum(path.stat().st_size for path in files) < 10e6


def test_the_files_belong_to_the_package() -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]
    package = ROOT / "src" / "wanlora"
    shipped_files = {path for pattern in data["wanlora"] for path in package.glob(f"{pattern}/*")}
    assert set(PRETRAINED.paths) <= shipped_files


def test_the_transformer_is_one_that_can_be_trained() -> None:
    with open_tensors(PRETRAINED.dit) as source:
        check_task(inspect_transformer(source), "t2v-14B")


def test_a_copy_is_equal_and_is_not_made_twice(tmp_path: Path) -> None:
    files = copy_pretrained(tmp_path)
    for source, target in zip(PRETRAINED.paths, files.paths, strict=True):
        assert source.read_bytes() == target.read_bytes()
    times = [path.stat().st_mtime_ns for path in files.paths]
    files.t5.write_bytes(b"another")
    copy_pretrained(tmp_path)
    assert files.t5.read_bytes() == PRETRAINED.t5.read_bytes()
    assert [files.dit.stat().st_mtime_ns, files.vae.stat().st_mtime_ns] == times[:2]


def test_an_installation_without_them_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "PRETRAINED", replace(PRETRAINED, vae=tmp_path / "gone.safetensors"))
    with pytest.raises(CheckpointError, match=r"gone\.safetensors belongs to wanlora"):
        copy_pretrained(tmp_path)
