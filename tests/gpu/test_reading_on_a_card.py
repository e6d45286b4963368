"""Reading a file straight to a card: the bits of the file, also where memory is used again at once."""

from pathlib import Path

import pytest
import torch

from wanlora.foundation import reading
from wanlora.foundation.tensor_files import open_tensors, save_tensors

pytestmark = pytest.mark.gpu

CARD = torch.device("cuda", 0)


def test_tensors_on_the_card_are_those_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_PIECE", 1 << 20)
    monkeypatch.setattr(reading, "_AHEAD", 8 << 20)
    generator = torch.Generator().manual_seed(0)
    tensors = {f"t{number:03}": torch.randn(600, 1000, generator=generator) for number in range(100)}
    save_tensors(tmp_path / "x.safetensors", tensors)
    sums = {}
    with open_tensors(tmp_path / "x.safetensors") as source:
        for name, tensor in source.read_all(source.names, lambda name: CARD):
            assert tensor.device == CARD
            for _ in range(5):  # keeps the card busy with this memory, which the next tensor may get
                tensor = tensor * 2
            sums[name] = tensor
            del tensor
    assert all(torch.equal(sums[name].cpu(), tensors[name] * 32) for name in tensors)
