"""Files of named tensors, whole, sharded, pickled and broken."""

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor

from wanlora.foundation import tensor_files
from wanlora.foundation.errors import CheckpointError
from wanlora.foundation.headers import stored_names
from wanlora.foundation.tensor_files import open_tensors, save_tensors

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


def write_shards(folder: Path) -> list[Path]:
    paths = [folder / f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for path, (name, tensor) in zip(paths, TENSORS.items(), strict=True):
        save_tensors(path, {name: tensor})
    return paths


def assert_holds(path: Path, expected: dict[str, Tensor]) -> None:
    with open_tensors(path) as source:
        assert set(source.names) == set(expected)
        for name, tensor in expected.items():
            assert source.shape(name) == tuple(tensor.shape)
            assert source.dtype(name) == tensor.dtype
            assert torch.equal(source.read(name), tensor)


def test_safetensors_come_back_with_metadata(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, TENSORS, {"key": "value"})
    assert_holds(path, TENSORS)
    with open_tensors(path) as source:
        assert source.metadata == {"key": "value"}
        assert "b" in source and "c" not in source


def test_pickles_are_read_with_and_without_a_wrapper(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "plain.pth")
    torch.save({"state_dict": TENSORS}, tmp_path / "wrapped.pth")
    assert_holds(tmp_path / "plain.pth", TENSORS)
    assert_holds(tmp_path / "wrapped.pth", TENSORS)


def test_a_pickle_that_could_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"path": tmp_path}, tmp_path / "code.pth")
    with pytest.raises(CheckpointError, match="could run foreign code"):
        open_tensors(tmp_path / "code.pth")


def test_shards_are_found_from_any_shard_an_index_and_the_folder(tmp_path: Path) -> None:
    shards = write_shards(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    for path in (*shards, tmp_path):
        assert_holds(path, TENSORS)
    index.write_text(json.dumps({"weight_map": {"a.weight": shards[0].name, "b": shards[1].name}}))
    assert_holds(index, TENSORS)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    shards = write_shards(tmp_path)
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors"):
        open_tensors(shards[0])


@pytest.mark.parametrize("kept", [0, 4, 20, -1])
def test_a_cut_off_file_is_refused(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, TENSORS)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"x\.safetensors is cut off"):
        open_tensors(path)


def test_missing_and_foreign_files_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        open_tensors(tmp_path / "nothing.safetensors")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"not from \.gguf files"):
        open_tensors(tmp_path / "model.gguf")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(CheckpointError, match=r"text\.pth"):
        open_tensors(tmp_path / "text.pth")


def test_a_full_disk_is_an_error_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save_on_a_full_disk(tensors: dict[str, Tensor], path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(tensor_files, "save_file", save_on_a_full_disk)
    with pytest.raises(OSError, match="No space left on device"):
        save_tensors(tmp_path / "a.safetensors", {"a": torch.ones(2)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
def test_a_file_that_may_not_be_opened_is_not_called_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def refuse(*anything: object, **more: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    (tmp_path / name).write_bytes(b"closed")
    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(CheckpointError, match=r"a\.\w+ cannot be read \(Permission denied\); check that you may open"):
        open_tensors(tmp_path / name)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_names_in_a_pickle_are_found_without_running_or_loading_it(tmp_path: Path, zipped: bool) -> None:
    content = {"state_dict": {**TENSORS, "p": torch.nn.Parameter(torch.ones(2)), "epoch": 3}, "where": tmp_path}
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    assert stored_names(tmp_path / "x.pth") == ("a.weight", "b", "p")


class _Harm:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('harm')",)


def test_a_pickle_that_would_run_code_runs_none_when_its_names_are_read(tmp_path: Path) -> None:
    torch.save({"a": _Harm(), **TENSORS}, tmp_path / "x.pth")
    assert set(stored_names(tmp_path / "x.pth")) >= set(TENSORS)


def test_names_of_shards_are_those_of_all_files(tmp_path: Path) -> None:
    shards = write_shards(tmp_path)
    for path in (tmp_path, shards[1]):
        assert stored_names(path) == ("a.weight", "b")
    (tmp_path / "senseless.pth").write_bytes(b"hello")
    with pytest.raises(CheckpointError, match="cut off or is no PyTorch weights file"):
        stored_names(tmp_path / "senseless.pth")
