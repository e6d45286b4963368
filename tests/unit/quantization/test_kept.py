"""What is kept of a quantised model comes back to the bit, and only when it is what is asked for."""

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from wanlora.foundation import files
from wanlora.foundation.tensor_files import save_tensors
from wanlora.models.wan.checkpoint import load_transformer
from wanlora.models.wan.spec import WanSizes
from wanlora.models.wan.transformer import WanTransformer
from wanlora.quantization.installer import Fp8Installer, Mode
from wanlora.quantization.kept import KeptCopy

CPU = torch.device("cpu")
SIZES = WanSizes(dim=128, ffn_dim=320, num_layers=2, in_channels=16, out_channels=16, text_dim=64, freq_dim=32)
NOTES = ["fp8: 20 block weights", "and a second line"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "wan.safetensors"
    save_tensors(path, {name: value.to(torch.bfloat16) for name, value in WanTransformer(SIZES).state_dict().items()})
    return path


@pytest.fixture(autouse=True)
def _log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "wanlora")


def load(path: Path, mode: Mode = "scaled") -> WanTransformer:
    install = Fp8Installer(CPU, torch.bfloat16, mode)
    return load_transformer(path, "t2v-1.3B", device=CPU, dtype=torch.bfloat16, install=install, progress=False)


def keep(checkpoint: Path, mode: Mode = "scaled", merged: tuple[tuple[Path, float], ...] = ()) -> KeptCopy:
    return KeptCopy.of(checkpoint.parent / "kept", checkpoint, mode=mode, dtype=torch.bfloat16, merged=merged)


def bits(model: WanTransformer) -> dict[str, Tensor]:
    return {name: tensor.contiguous().flatten().view(torch.uint8) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("mode", ["scaled", "plain", "rows"])
def test_the_model_that_comes_back_is_the_same_to_the_bit(checkpoint: Path, mode: Mode) -> None:
    model, kept = load(checkpoint, mode), keep(checkpoint, mode)
    assert kept.difference() == "is missing"
    kept.write(model, NOTES)
    assert kept.difference() is None
    assert kept.notes() == NOTES
    again = load(kept.path, mode)
    first, second = bits(model), bits(again)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {name: tensor.dtype for name, tensor in model.state_dict().items()} == {
        name: tensor.dtype for name, tensor in again.state_dict().items()
    }
    assert kept.path.stat().st_size < 0.8 * checkpoint.stat().st_size


def test_copies_of_other_settings_lie_side_by_side(checkpoint: Path) -> None:
    lora = checkpoint.parent / "style.safetensors"
    save_tensors(lora, {"a": torch.ones(2)})
    copies = [keep(checkpoint), keep(checkpoint, "plain"), keep(checkpoint, merged=((lora, 1.0),))]
    copies.append(keep(checkpoint, merged=((lora, 0.5),)))
    for copy in copies:
        copy.write(load(checkpoint), [])
    assert len({copy.path for copy in copies}) == len(copies)
    assert [copy.difference() for copy in copies] == [None] * len(copies)
    save_tensors(lora, {"a": torch.zeros(2)})
    stale = keep(checkpoint, merged=((lora, 1.0),)).difference()
    assert stale == "was made of something else (what differs: files)"
    assert keep(checkpoint).difference() is None


def change_content(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def change_time(path: Path) -> None:
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


@pytest.mark.parametrize("change", [change_content, change_time])
def test_a_copy_of_another_checkpoint_is_noticed(checkpoint: Path, change: Callable[[Path], None]) -> None:
    keep(checkpoint).write(load(checkpoint), [])
    change(checkpoint)
    kept = keep(checkpoint)
    assert kept.difference() == "was made of something else (what differs: files)"
    kept.write(load(checkpoint), [])
    assert kept.difference() is None
    assert list(kept.path.parent.iterdir()) == [kept.path]


def test_a_copy_that_another_version_made_is_not_used(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(checkpoint).write(load(checkpoint), [])
    monkeypatch.setattr("wanlora.__version__", "99.0")
    assert keep(checkpoint).difference() == "was made of something else (what differs: version)"


@pytest.mark.parametrize("kept_bytes", [0, 5, 1000, -1])
def test_a_damaged_copy_is_noticed(checkpoint: Path, kept_bytes: int) -> None:
    kept = keep(checkpoint)
    kept.write(load(checkpoint), [])
    kept.path.write_bytes(kept.path.read_bytes()[:kept_bytes])
    assert kept.difference() == "is damaged"
    kept.write(load(checkpoint), [])
    assert kept.difference() is None


def test_a_file_of_somebody_else_is_left_alone(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept = keep(checkpoint)
    kept.path.parent.mkdir()
    save_file({"a": torch.ones(2)}, kept.path, {"wanlora_made_of": json.dumps({"version": "0"})})
    assert kept.difference() is not None and "another file" not in kept.difference()  # type: ignore[operator]
    save_file({"a": torch.ones(2)}, kept.path, {"made": "elsewhere"})
    before = kept.path.read_bytes()
    assert kept.difference() == "is another file"
    kept.write(load(checkpoint), [])
    assert kept.path.read_bytes() == before
    assert "is left alone; the quantised weights are not kept" in caplog.text


def test_a_full_disk_leaves_nothing_behind_and_is_no_error(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kept, model = keep(checkpoint), load(checkpoint)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
        kept.write(model, [])
    assert "could not be kept" in caplog.text and "0.0 GB are free" in caplog.text

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    kept.write(model, [])
    assert "No space left on device" in caplog.text
    assert list(kept.path.parent.iterdir()) == []
