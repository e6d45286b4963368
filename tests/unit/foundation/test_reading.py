"""Tensors of a file read ahead by threads are those of the file, in bounded memory, and faults are named."""

import sys
import threading
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

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
    monkeypatch.setattr(reading, "_GROUP", 300)
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
    made = reading._Group.__init__

    def counted(self: reading._Group, tensors: Sequence[Wanted]) -> None:
        begun.extend(wanted.name for wanted in tensors)
        made(self, tensors)

    monkeypatch.setattr(reading._Group, "__init__", counted)
    with open_tensors(tmp_path / "x.safetensors") as source:
        for number, _ in enumerate(source.read_all(source.names, lambda name: CPU)):
            assert len(begun) <= number + 3  # the one in hand and two of 400 bytes on the way


def test_neighbours_are_read_together_and_the_threads_hear_of_few_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {f"t{number:03}": torch.full((number % 7,), float(number)) for number in range(100)}
    tensors["t050"] = torch.ones(500)  # alone, in pieces
    write_tensors(tmp_path / "x.safetensors", tensors, {})
    pieces = []
    read = reading._read

    def counted(group: reading._Group, start: int, *rest: Any) -> None:
        pieces.append((len(group.tensors), start))
        read(group, start, *rest)

    monkeypatch.setattr(reading, "_read", counted)
    monkeypatch.setattr(reading, "_PIECE", 1000)
    with open_tensors(tmp_path / "x.safetensors") as source:
        found = dict(source.read_all(source.names, lambda name: CPU))
    assert all(bits(found[name]) == bits(tensors[name]) for name in tensors)
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert len(pieces) < 10 and [start for count, start in pieces if count == 1] == [0, 1000]
    memories = [tensor.untyped_storage() for tensor in found.values() if tensor.numel()]
    sizes = {memory.data_ptr(): memory.nbytes() for memory in memories}
    assert len(sizes) == len(pieces) - 1 and sum(sizes.values()) == total


def test_a_small_gap_is_read_and_a_large_one_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"a": torch.randn(9), "unwanted": torch.randn(5), "b": torch.randn(7)}
    write_tensors(tmp_path / "x.safetensors", tensors, {})
    for gap, memories in ((20, 1), (19, 2)):
        monkeypatch.setattr(reading, "_GAP", gap)
        with open_tensors(tmp_path / "x.safetensors") as source:
            found = dict(source.read_all(["b", "a"], lambda name: CPU))
        assert list(found) == ["a", "b"] and all(bits(found[name]) == bits(tensors[name]) for name in found)
        assert len({tensor.untyped_storage().data_ptr() for tensor in found.values()}) == memories


def test_numbers_of_several_bytes_may_begin_anywhere(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(3).to(torch.uint8), "b": torch.randn(9), "c": torch.randn(5).bfloat16()}
    write_tensors(tmp_path / "x.safetensors", tensors, {})
    with open_tensors(tmp_path / "x.safetensors") as source:
        found = dict(source.read_all(source.names, lambda name: CPU))
    assert all(bits(found[name]) == bits(tensors[name]) for name in tensors)
    assert all(tensor.data_ptr() % tensor.element_size() == 0 for tensor in found.values())


def test_threads_that_read_get_their_turn_sooner_meanwhile(tmp_path: Path) -> None:
    save_tensors(tmp_path / "x.safetensors", {"a": torch.ones(50), "b": torch.ones(50)})
    usual = sys.getswitchinterval()
    with open_tensors(tmp_path / "x.safetensors") as source:
        assert {sys.getswitchinterval() for _ in source.read_all(source.names, lambda name: CPU)} == {0.0005}
        assert sys.getswitchinterval() == usual
        with closing(source.read_all(source.names, lambda name: CPU)) as tensors:  # type: ignore[type-var]
            next(tensors)
        assert sys.getswitchinterval() == usual


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
