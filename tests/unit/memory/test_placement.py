"""Streamed blocks on their way to the host, while a model is read."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from wanlora.foundation.tensor_files import save_tensors, write_tensors
from wanlora.memory.placement import LeavingBlocks, _send_to_host, streamed_indexes
from wanlora.memory.streaming import BlockStream
from wanlora.models.wan.checkpoint import Install, install_parameter, load_transformer
from wanlora.models.wan.spec import WanSizes
from wanlora.models.wan.transformer import WanTransformer
from wanlora.quantization.installer import Fp8Installer
from wanlora.quantization.kept import kept_tensors

CPU = torch.device("cpu")
SIZES = WanSizes(dim=128, ffn_dim=192, num_layers=3, in_channels=16, out_channels=16, text_dim=32, freq_dim=32)
STREAMED = streamed_indexes(3, 2)


def installer(fp8: bool) -> Install:
    return Fp8Installer(CPU, torch.float32) if fp8 else install_parameter


@pytest.mark.parametrize("fp8", [False, True])
def test_streamed_blocks_leave_when_they_are_complete_and_are_not_copied_again(tmp_path: Path, fp8: bool) -> None:
    torch.manual_seed(0)
    save_tensors(tmp_path / "wan.safetensors", WanTransformer(SIZES).state_dict())
    read = partial(
        load_transformer, tmp_path / "wan.safetensors", "t2v-1.3B", device=CPU, dtype=torch.float32, progress=False
    )
    leaving = LeavingBlocks(CPU, STREAMED)
    leave, gone = leaving.after(installer(fp8)), dict[str, set[int]]()

    def noting(model: WanTransformer, name: str, tensor: Tensor, scale: Tensor | None) -> None:
        leave(model, name, tensor, scale)
        gone[name] = set(leaving.masters)

    model, plain = read(install=noting), read(install=installer(fp8))
    for index in STREAMED:
        before = [index in masters for name, masters in gone.items() if name.startswith(f"blocks.{index}.")]
        assert before == [False] * (len(before) - 1) + [True]
    assert set(leaving.masters) == set(STREAMED)
    write_tensors(tmp_path / "kept.safetensors", kept_tensors(model), {})
    assert_same(load_file(tmp_path / "kept.safetensors"), kept_tensors(plain))

    masters = dict(leaving.masters)
    stream = BlockStream(list(model.blocks), len(STREAMED), CPU, 1, masters=masters)
    stream.attach()
    assert stream._masters == masters
    arguments = (torch.randn(1, 16, 1, 4, 6), torch.tensor([400.0]), [torch.randn(5, 32)])
    with torch.no_grad():
        assert torch.equal(model(*arguments), plain(*arguments))
    stream.detach()
    assert_same(dict(model.state_dict()), dict(plain.state_dict()))


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name].float(), theirs[name].float()) for name in ours)


def test_blocks_of_a_model_that_is_not_used_give_their_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    given_back: list[Tensor] = []
    monkeypatch.setattr("wanlora.memory.placement.unpin", given_back.append)
    model, leaving = WanTransformer(SIZES).requires_grad_(False), LeavingBlocks(CPU, (1,))
    leave = leaving.after(lambda *arguments: None)
    for name in ("blocks.0.modulation", "blocks.1.modulation", "head.modulation"):
        leave(model, name, torch.zeros(1), None)
    (master,) = leaving.masters.values()
    leaving.forget()
    assert [buffer is master.flat for buffer in given_back] == [True] and not leaving.masters


def test_of_many_incomplete_blocks_what_there_is_waits_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file may have all matrices of one format before all of another."""
    sent: list[nn.Module] = []
    monkeypatch.setattr("wanlora.memory.placement._send_to_host", sent.append)
    with torch.device("meta"):
        model = WanTransformer(replace(SIZES, num_layers=4)).requires_grad_(False)
    leaving = LeavingBlocks(CPU, (0, 1, 2, 3))
    leave = leaving.after(install_parameter)
    full = WanTransformer(replace(SIZES, num_layers=4)).state_dict()
    for name in sorted(full, key=lambda name: name.split(".")[2:]):
        leave(model, name, full[name], None)
    assert set(map(id, sent)) == set(map(id, model.blocks)) and len(leaving.masters) == 4


def test_a_block_that_waits_on_the_host_is_whole_there() -> None:
    block = WanTransformer(SIZES).requires_grad_(False).blocks[0]
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    _send_to_host(block)
    assert_same(dict(block.state_dict()), before)
