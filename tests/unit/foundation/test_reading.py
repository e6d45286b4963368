"""Tensors of a file read ahead by threads are those of the file, in bounded memory, and faults are named."""

import threading
from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import Tensor

from wanlora.foundation import reading
from wanlora.foundation.errors import CheckpointError
from wanlora.foundation.reading import Wanted, read_ahead
from wanlora.foundation.tensor_files import open_tensors, save_tensors, write_tensors

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_PIECE", 64)
    monkeypatch.setattr(reading, "_AHEAD", 1000)


def some_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3,), (), (0, 4), (16, 33), (200, 5), (1,), (64,)]
    tensors = {f"t{number}": torch.randn(shape, generator=generator) for number, shape in enumerate(shapes)}
    return {**tensors, "eight": torch.randn(40, 7).to(torch.float8_e4m3fn), "half": torch.ones(5).bfloat16()}


def bits(tensor: Tensor) -> list[int]:
    return tensor.flatten().view(torch.uint8).tolist()


@pytest.mark.parametrize("threads", [1, 5])
def test_every_tensor_comes_once_in_order_and_to_the_bit(tmp_path: Path, threads: int) -> None:
    tensors = some_tensors()
    write_tensors(tmp_path / "x.safetensors", tensors, {"made": "here"})
    with open_tensors(tmp_path / "x.safetensors") as source:
        assert source.metadata == {"made": "here"}
        wanted = [source.wanted(name, CPU) for name in source.names]  # type: ignore[attr-defined]
        found = dict(read_ahead(wanted, threads))
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert found[name].shape == tensor.shape and found[name].dtype == tensor.dtype
        assert bits(found[name]) == bits(tensor)


def test_all_of_a_file_or_of_its_shards_is_read_in_the_order_of_the_disk(tmp_path: Path) -> None:
    tensors = some_tensors()
    for number, names in ((1, list(tensors)[:4]), (2, list(tensors)[4:])):
        save_tensors(tmp_path / f"m-0000{number}-of-00002.safetensors", {name: tensors[name] for name in names})
    with open_tensors(tmp_path) as source:
        asked: list[str] = []
        found = dict(source.read_all(reversed(source.names), lambda name: asked.append(name) or CPU))  # type: ignore[func-returns-value]
    assert set(asked) == set(found) == set(tensors)
    assert all(bits(found[name]) == bits(tensors[name]) for name in tensors)


def test_no_more_is_read_ahead_than_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tensors(tmp_path / "x.safetensors", {f"t{number:02}": torch.ones(100) for number in range(20)})
    begun: list[str] = []
    arriving = reading._Arriving.__init__

    def counted(self: reading._Arriving, wanted: Wanted) -> None:
        begun.append(wanted.name)
        arriving(self, wanted)

    monkeypatch.setattr(reading._Arriving, "__init__", counted)
    with open_tensors(tmp_path / "x.safetensors") as source:
        for number, _ in enumerate(source.read_all(source.names, lambda name: CPU)):
            assert len(begun) <= number + 3  # the one in hand and two of 400 bytes on the way


def test_a_file_that_ends_early_is_named_and_threads_end(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.ones(50), "b": torch.ones(50)})
    before = threading.active_count()
    with open_tensors(path) as source:
        wanted = [source.wanted(name, CPU) for name in source.names]  # type: ignore[attr-defined]
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"x\.safetensors has become shorter"):
        list(read_ahead(wanted))
    with closing(read_ahead(wanted[:1])) as tensors:
        next(tensors)
    assert threading.active_count() == before
