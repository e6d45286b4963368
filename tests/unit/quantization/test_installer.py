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
from wanlora.quantization.blockwise import dequantize, quantize_blockwise, relative_error
from wanlora.quantization.fast_linear import fast_layers
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


def test_fp8_maths_get_a_scale_for_each_output(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    installer = Fp8Installer(CPU, torch.bfloat16, "rows")
    model = load(tmp_path, tensors, installer)
    layers = fast_layers(model)
    assert len(layers) == 2 * LINEARS_PER_BLOCK and {layer.kernel for layer in layers.values()} == {"emulated"}
    layer, weight = layers["blocks.1.ffn.2"], tensors["blocks.1.ffn.2.weight"]
    assert layer.scale.shape == (len(weight), 1, 1)
    torch.testing.assert_close(layer.scale.flatten(), weight.float().abs().amax(dim=1) / 448, rtol=1e-6, atol=0)
    assert 0.02 < relative_error(weight, layer.weight, layer.scale) < 0.03
    assert layer.bias is not None and torch.equal(layer.bias, tensors["blocks.1.ffn.2.bias"])
    (line,) = installer.summary()
    assert "20 block weights with a scale per output, relative error 2." in line


def test_ready_made_weights_serve_fp8_maths_as_they_are_or_are_rounded_anew(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    kept, per_tile, e5m2 = (f"blocks.0.{name}" for name in ("self_attn.q", "self_attn.k", "ffn.0"))
    exact = {name: tensors[f"{name}.weight"].float() for name in (per_tile, e5m2)}
    tensors[f"{kept}.weight"] = (tensors[f"{kept}.weight"].float() / 0.25).to(torch.float8_e4m3fn)
    tensors[f"{kept}.scale_weight"] = torch.tensor(0.25)
    fp8, scale = quantize_blockwise(exact[per_tile])
    tensors[f"{per_tile}.weight"], tensors[f"{per_tile}.scale_weight"] = fp8, scale.squeeze(2)
    tensors[f"{e5m2}.weight"] = exact[e5m2].to(torch.float8_e5m2)
    installer = Fp8Installer(CPU, torch.bfloat16, "rows")
    layers = fast_layers(load(tmp_path, tensors, installer))
    assert installer.report.ready_made == [f"{kept}.weight"]
    assert torch.equal(layers[kept].weight.view(torch.uint8), tensors[f"{kept}.weight"].view(torch.uint8))
    assert torch.equal(layers[kept].scale, torch.full((128, 1, 1), 0.25))
    assert sorted(installer.report.rounded_anew) == sorted([f"{per_tile}.weight", f"{e5m2}.weight"])
    assert relative_error(exact[per_tile], layers[per_tile].weight, layers[per_tile].scale) < 0.05
    assert relative_error(exact[e5m2], layers[e5m2].weight, layers[e5m2].scale) < 0.08
    text = "\n".join(installer.summary())
    assert "2 weights are in fp8 in the file, with scales that fp8 maths cannot use" in text


def test_weights_that_fp8_maths_cannot_take_are_counted(tmp_path: Path) -> None:
    sizes = WanSizes(dim=128, ffn_dim=200, num_layers=1, in_channels=16, out_channels=16, text_dim=64, freq_dim=32)
    installer = Fp8Installer(CPU, torch.float32, "rows")
    model = load(tmp_path, dict(WanTransformer(sizes).state_dict()), installer)
    assert set(installer.report.wide_maths) == {"blocks.0.ffn.0.weight", "blocks.0.ffn.2.weight"}
    assert len(fast_layers(model)) == LINEARS_PER_BLOCK - 2
    assert any("2 weights have a side that 16 does not divide" in line for line in installer.summary())


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
