"""Tensors reach the file to the bit, also through the buffers that a card's tensors pass, in few large pieces."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from wanlora.foundation import writing
from wanlora.foundation.tensor_files import open_tensors, write_tensors
from wanlora.foundation.writing import host_views


def some_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3,), (), (0, 4), (16, 33), (200, 5), (1,), (64,), *[(2, 5)] * 30]
    tensors = {f"t{number}": torch.randn(shape, generator=generator) for number, shape in enumerate(shapes)}
    return {**tensors, "turned": torch.randn(6, 9).T, "eight": torch.randn(40, 7).to(torch.float8_e4m3fn)}


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().flatten().view(torch.uint8).tolist())


@pytest.fixture
def buffers(monkeypatch: pytest.MonkeyPatch) -> list[writing._Buffer]:
    """Tensors go as those of a card do, through small buffers; the ones that were made."""
    made: list[writing._Buffer] = []
    begin = writing._Buffer.__init__

    def counted(self: writing._Buffer, device: torch.device) -> None:
        made.append(self)
        begin(self, device)

    monkeypatch.setattr(writing._Buffer, "__init__", counted)
    monkeypatch.setattr(writing, "_PIECE", 1000)
    monkeypatch.setattr(writing, "_on_host", lambda tensor: False)
    return made


def test_everything_goes_through_two_buffers_in_pieces_of_their_size(buffers: list[writing._Buffer]) -> None:
    tensors = some_tensors()
    pieces = [bytes(view) for view in host_views(tensors.values())]
    assert b"".join(pieces) == b"".join(map(bits, tensors.values()))
    assert {len(piece) for piece in pieces[:-1]} == {1000} and len(buffers) == 2
    assert not list(host_views([]))


def test_a_buffer_is_filled_before_the_one_ahead_of_it_is_written(
    buffers: list[writing._Buffer], monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    take = writing._Buffer.take

    def noting(self: writing._Buffer, flat: Tensor) -> Tensor:
        events.append("fill")
        return take(self, flat)

    monkeypatch.setattr(writing._Buffer, "take", noting)
    for view in host_views([torch.ones(875)]):  # 3500 bytes
        events.append(f"write {len(view)}")
    assert events == ["fill", "fill", "write 1000", "fill", "write 1000", "fill", "write 1000", "write 500"]


def test_tensors_of_the_host_are_written_from_where_they_are_in_their_order(
    buffers: list[writing._Buffer], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tensors = some_tensors()
    host = torch.ones(700)
    monkeypatch.setattr(writing, "_on_host", lambda tensor: tensor.data_ptr() == host.data_ptr())
    mixed = {**tensors, "host": host, "more": torch.randn(300)}
    write_tensors(tmp_path / "x.safetensors", mixed, {"made": "here"})
    with open_tensors(tmp_path / "x.safetensors") as source:
        assert source.metadata == {"made": "here"}
        assert {name: bits(source.read(name)) for name in source.names} == {n: bits(t) for n, t in mixed.items()}
    monkeypatch.setattr(writing, "_on_host", lambda tensor: True)
    (view,) = host_views([host])
    host[0] = 5
    assert bytes(view) == bits(host) and len(buffers) == 2
