"""Reading a file straight to a card and back: its bits, also where memory is used again at once."""

from pathlib import Path
from typing import Any

import pytest
import torch

from wanlora.foundation import reading, writing
from wanlora.foundation.tensor_files import open_tensors, save_tensors, write_tensors
from wanlora.memory.pinned import is_page_locked
from wanlora.memory.placement import LeavingBlocks, streamed_indexes
from wanlora.memory.streaming import BlockStream
from wanlora.models.wan.checkpoint import load_transformer
from wanlora.models.wan.spec import WanSizes
from wanlora.models.wan.transformer import WanTransformer
from wanlora.quantization.installer import Fp8Installer

pytestmark = pytest.mark.gpu

CARD = torch.device("cuda", 0)


def test_tensors_on_the_card_are_those_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_PIECE", 1 << 20)
    monkeypatch.setattr(reading, "_GROUP", 5 << 20)
    monkeypatch.setattr(reading, "_AHEAD", 12 << 20)
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


def test_tensors_of_the_card_reach_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "_PIECE", 1 << 20)
    generator = torch.Generator().manual_seed(0)
    tensors = {f"t{number:03}": torch.randn(number, 1000, generator=generator) for number in range(300)}
    tensors |= {"eight": tensors["t100"].to(torch.float8_e4m3fn), "turned": tensors["t099"].T}
    placed = {name: tensor if name == "t150" else tensor.to(CARD) for name, tensor in tensors.items()}
    write_tensors(tmp_path / "x.safetensors", placed, {})
    with open_tensors(tmp_path / "x.safetensors") as source:
        for name, tensor in source.read_all(source.names, lambda name: CARD):
            assert tensor.dtype == tensors[name].dtype
            assert torch.equal(tensor.cpu().float(), tensors[name].float())


def test_streamed_blocks_leave_the_card_while_the_model_is_read(tmp_path: Path) -> None:
    sizes = WanSizes(dim=512, ffn_dim=1024, num_layers=8, in_channels=16, out_channels=16, text_dim=64, freq_dim=32)
    torch.manual_seed(0)
    save_tensors(tmp_path / "wan.safetensors", WanTransformer(sizes).state_dict())
    streamed = streamed_indexes(8, 7)
    leaving = LeavingBlocks(CARD, streamed)
    options: dict[str, Any] = {"device": CARD, "dtype": torch.bfloat16, "progress": False}
    path = tmp_path / "wan.safetensors"
    before = torch.cuda.memory_allocated(CARD)
    install = leaving.after(Fp8Installer(CARD, torch.bfloat16))
    model = load_transformer(path, "t2v-1.3B", install=install, **options)
    block = leaving.masters[streamed[0]].num_bytes
    assert len(leaving.masters) == 7 and all(is_page_locked(master.flat) for master in leaving.masters.values())
    outside = sum(tensor.nbytes for name, tensor in model.named_parameters() if not name.startswith("blocks."))
    assert torch.cuda.memory_allocated(CARD) - before < outside + 2 * block
    plain = load_transformer(path, "t2v-1.3B", install=Fp8Installer(CARD, torch.bfloat16), **options)
    stream = BlockStream(list(model.blocks), 7, CARD, 2, masters=leaving.masters)
    stream.attach()
    x = torch.randn(1, 16, 1, 8, 8, device=CARD)
    arguments = (x, torch.tensor([400.0], device=CARD), [torch.randn(9, 64, device=CARD)])
    with torch.no_grad():
        assert torch.equal(model(*arguments), plain(*arguments))
