"""Quantising a transformer while it is read from a file."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from wanlora.foundation.errors import CheckpointError
from wanlora.foundation.tensor_files import save_tensors
from wanlora.models.wan.checkpoint import load_transformer
from wanlora.models.wan.spec import WanSizes
from wanlora.models.wan.transformer import WanTransformer
from wanlora.quantization.blockwise import dequantize, quantize_blockwise
from wanlora.quantization.installer import Fp8Installer
from wanlora.quantization.linear import Fp8Linear

CPU = torch.device("cpu")
SIZES = WanSizes(dim=128, ffn_dim=320, num_layers=2, in_channels=16, out_channels=16, text_dim=64, freq_dim=32)
LINEARS_PER_BLOCK = 10


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: value.to(torch.bfloat16) for name, value in WanTransformer(SIZES).state_dict().items()}


def load(tmp_path: Path, tensors: dict[str, Tensor], installer: Fp8Installer) -> WanTransformer:
    path = tmp_path / "wan.safetensors"
    save_tensors(path, tensors)
    return load_transformer(path, "t2v-1.3B", device=CPU, dtype=torch.bfloat16, install=installer, progress=False)


def test_linears_of_the_blocks_become_fp8_and_all_else_stays(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    installer = Fp8Installer(CPU, torch.bfloat16)
    model = load(tmp_path, tensors, installer)
    fp8 = {name for name, module in model.named_modules() if isinstance(module, Fp8Linear)}
    assert len(fp8) == 2 * LINEARS_PER_BLOCK and all(name.startswith("blocks.") for name in fp8)
    linear = model.get_submodule("blocks.1.ffn.2")
    assert isinstance(linear, Fp8Linear)
    weight, scale = quantize_blockwise(tensors["blocks.1.ffn.2.weight"])
    assert torch.equal(linear.weight.view(torch.uint8), weight.view(torch.uint8)) and torch.equal(linear.scale, scale)
    assert linear.bias is not None and torch.equal(linear.bias, tensors["blocks.1.ffn.2.bias"])
    assert linear.bias.dtype == torch.bfloat16
    assert torch.equal(model.get_parameter("blocks.0.modulation").bfloat16(), tensors["blocks.0.modulation"])
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_summary_counts_what_was_done(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    installer = Fp8Installer(CPU, torch.bfloat16)
    load(tmp_path, tensors, installer)
    assert len(installer.report.quantized) == 2 * LINEARS_PER_BLOCK
    assert {"text_embedding.0.weight", "time_projection.1.weight", "head.head.weight"} <= set(installer.report.excluded)
    assert 0.02 < installer.report.scaled_error < 0.03
    text = "\n".join(installer.summary())
    assert "20 block weights" in text and "relative error 2." in text and "does not divide" not in text


def test_widths_that_64_does_not_divide_are_announced(tmp_path: Path) -> None:
    sizes = WanSizes(dim=128, ffn_dim=200, num_layers=1, in_channels=16, out_channels=16, text_dim=64, freq_dim=32)
    tensors = dict(WanTransformer(sizes).state_dict())
    installer = Fp8Installer(CPU, torch.float32)
    load(tmp_path, tensors, installer)
    assert installer.report.per_row == ["blocks.0.ffn.2.weight"]
    assert any("1 weights have inputs that 64 does not divide" in line for line in installer.summary())


def test_without_scales_the_error_is_larger_and_said_to_be(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    installer = Fp8Installer(CPU, torch.bfloat16, "plain")
    linear = load(tmp_path, tensors, installer).get_submodule("blocks.0.self_attn.q")
    assert isinstance(linear, Fp8Linear) and linear.scale.shape == (1, 1, 1) and linear.scale.item() == 1
    report = installer.report
    assert report.plain_error > report.scaled_error
    assert any("--fp8_scaled has a relative error of 2." in line for line in installer.summary())


def test_weights_that_are_fp8_in_the_file_are_kept_to_the_bit(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    names = [name for name in tensors if name.startswith("blocks.") and name.endswith(".weight") and "norm" not in name]
    for name in names:
        tensors[name] = (tensors[name].float() / 0.25).to(torch.float8_e4m3fn)
        tensors[name.removesuffix("weight") + "scale_weight"] = torch.tensor(0.25)
    installer = Fp8Installer(CPU, torch.bfloat16)
    model = load(tmp_path, tensors, installer)
    assert sorted(installer.report.ready_made) == sorted(names) and not installer.report.quantized
    for name in names:
        linear = model.get_submodule(name.removesuffix(".weight"))
        assert isinstance(linear, Fp8Linear)
        assert torch.equal(linear.weight.view(torch.uint8), tensors[name].view(torch.uint8))
        assert torch.equal(linear.dequantized(), (tensors[name].float() * 0.25).bfloat16())


def test_tensors_rest_where_the_place_says(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    asked: list[str] = []

    def place(name: str) -> torch.device:
        asked.append(name)
        return CPU

    load(tmp_path, tensors, Fp8Installer(CPU, torch.bfloat16, place=place))
    assert set(asked) == set(tensors)


def test_a_weight_with_a_hole_in_it_is_refused(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    tensors["blocks.1.ffn.0.weight"][3, 4] = float("nan")
    with pytest.raises(CheckpointError, match=r"blocks\.1\.ffn\.0\.weight holds values that are not finite"):
        load(tmp_path, tensors, Fp8Installer(CPU, torch.bfloat16))


def test_the_fp8_model_predicts_nearly_what_the_full_one_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    full = WanTransformer(SIZES)
    path = tmp_path / "wan.safetensors"
    save_tensors(path, full.state_dict())
    installer = Fp8Installer(CPU, torch.float32)
    small = load_transformer(path, "t2v-1.3B", device=CPU, dtype=torch.float32, install=installer, progress=False)
    x, text = torch.randn(1, 16, 1, 8, 8), [torch.randn(7, 64)]
    with torch.no_grad():
        exact = full(x, torch.tensor([500.0]), text)
        close = small(x, torch.tensor([500.0]), text)
    assert 0 < (close - exact).norm() / exact.norm() < 0.05
    weight = small.get_submodule("blocks.0.ffn.0")
    assert isinstance(weight, Fp8Linear)
    assert not torch.equal(
        dequantize(weight.weight, weight.scale, torch.float32), full.get_parameter("blocks.0.ffn.0.weight")
    )
