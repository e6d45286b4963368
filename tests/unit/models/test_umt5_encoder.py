"""The UMT5 encoder: names, padding, number formats, files."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from wanlora.foundation.errors import CheckpointError, ConfigError
from wanlora.foundation.tensor_files import save_tensors
from wanlora.models.wan.row_fp8 import FP8, RowFp8Linear, quantise_rows
from wanlora.models.wan.scaled import dequantise
from wanlora.models.wan.umt5 import UMT5Encoder, UMT5Sizes, load_umt5

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "wan-key-shapes.json").read_text(encoding="utf-8"))
SIZES = UMT5Sizes(vocab=50, dim=32, attention_dim=24, ffn_dim=64, num_heads=3, num_layers=2, num_buckets=32)
FP8_MARK = torch.zeros(2, dtype=FP8)


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    """The state of a small encoder under official names, in numbers that bfloat16 holds exactly."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: (torch.randn(tensor.shape, generator=generator) * (0.2 if "blocks" in name else 1)).bfloat16().float()
        for name, tensor in UMT5Encoder(SIZES).state_dict().items()
    }


def encoder(tensors: dict[str, Tensor]) -> UMT5Encoder:
    model = UMT5Encoder(SIZES)
    model.load_state_dict(tensors)
    return model.eval()


def transformers_name(name: str) -> str:
    if name == "token_embedding.weight":
        return "shared.weight"
    if name == "norm.weight":
        return "encoder.final_layer_norm.weight"
    _, index, part = name.removesuffix(".weight").split(".", 2)
    parts = {
        "norm1": "layer.0.layer_norm",
        "norm2": "layer.1.layer_norm",
        "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
        "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
        "ffn.fc1": "layer.1.DenseReluDense.wi_1",
        "ffn.fc2": "layer.1.DenseReluDense.wo",
        **{f"attn.{letter}": f"layer.0.SelfAttention.{letter}" for letter in "qkvo"},
    }
    return f"encoder.block.{index}.{parts[part]}.weight"


def is_linear(name: str) -> bool:
    return "attn" in name or "ffn" in name


def assert_holds(model: UMT5Encoder, tensors: dict[str, Tensor], dtype: torch.dtype = torch.bfloat16) -> None:
    assert model.sizes == SIZES
    state = model.state_dict()
    assert state.keys() == tensors.keys()
    assert all(torch.equal(state[name], tensor.to(dtype)) for name, tensor in tensors.items())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_names_and_shapes_are_those_of_the_released_file() -> None:
    with torch.device("meta"):
        model = UMT5Encoder()
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == GOLDEN["umt5"]


def test_padding_does_not_change_the_other_rows(tensors: dict[str, Tensor]) -> None:
    model = encoder(tensors)
    ids = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(9) < torch.tensor([[9], [4]])
    padded = model(ids, mask)
    torch.testing.assert_close(padded[1, :4], model(ids[1:, :4])[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(padded[0], model(ids[:1])[0], atol=1e-5, rtol=1e-5)


def test_what_stands_in_the_padding_does_not_matter(tensors: dict[str, Tensor]) -> None:
    model, mask = encoder(tensors), torch.arange(6)[None] < 4
    assert torch.equal(
        model(torch.tensor([[5, 6, 7, 1, 0, 0]]), mask)[:, :4], model(torch.tensor([[5, 6, 7, 1, 9, 8]]), mask)[:, :4]
    )


def test_bfloat16_stays_near_float32(tensors: dict[str, Tensor]) -> None:
    ids = torch.arange(2, 22)[None]
    exact = encoder(tensors)(ids)
    rounded = encoder(tensors).bfloat16()(ids)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("prefix", ["", "encoder."])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_official_names_load(tmp_path: Path, tensors: dict[str, Tensor], prefix: str, dtype: torch.dtype) -> None:
    torch.save({prefix + name: tensor.bfloat16() for name, tensor in tensors.items()}, tmp_path / "t5.pth")
    assert_holds(load_umt5(tmp_path / "t5.pth", device="cpu", dtype=dtype), tensors, dtype)


def test_transformers_names_load_beside_what_the_encoder_does_not_need(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    stored = {transformers_name(name): tensor.half() for name, tensor in tensors.items()}
    extra = {
        "encoder.embed_tokens.weight": stored["shared.weight"].clone(),
        "decoder.block.0.layer.0.layer_norm.weight": torch.zeros(3),
        "lm_head.weight": torch.zeros(3),
        "spiece_model": torch.zeros(7, dtype=torch.uint8),
    }
    save_tensors(tmp_path / "umt5_xxl_fp16.safetensors", {**stored, **extra})
    model = load_umt5(tmp_path / "umt5_xxl_fp16.safetensors", device="cpu", dtype=torch.float32)
    assert_holds(model, {name: tensor.half().float() for name, tensor in tensors.items()}, torch.float32)


@pytest.mark.parametrize("scale_name", ["scale_weight", "weight_scale"])
def test_scaled_fp8_files_are_multiplied_out(tmp_path: Path, tensors: dict[str, Tensor], scale_name: str) -> None:
    stored: dict[str, Tensor] = {"scaled_fp8": FP8_MARK}
    expected = {}
    for name, tensor in tensors.items():
        stored[transformers_name(name)], expected[name] = tensor, tensor
        if is_linear(name):
            scale = tensor.abs().max() / 448
            stored[transformers_name(name)] = (tensor / scale).to(FP8)
            stored[transformers_name(name).removesuffix("weight") + scale_name] = scale
            stored[transformers_name(name).removesuffix("weight") + "scale_input"] = torch.ones(())
            expected[name] = (tensor / scale).to(FP8).float() * scale
    save_tensors(tmp_path / "umt5_xxl_fp8_e4m3fn_scaled.safetensors", stored)
    model = load_umt5(tmp_path / "umt5_xxl_fp8_e4m3fn_scaled.safetensors", device="cpu", dtype=torch.float32)
    assert_holds(model, expected, torch.float32)


def test_plain_fp8_files_are_cast_up(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    stored = {name: tensor.to(FP8) if is_linear(name) else tensor for name, tensor in tensors.items()}
    save_tensors(tmp_path / "t5.safetensors", stored)
    assert_holds(
        load_umt5(tmp_path / "t5.safetensors", device="cpu"), {name: tensor.float() for name, tensor in stored.items()}
    )


def test_fp8_halves_the_linear_weights_and_stays_near(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    save_tensors(tmp_path / "t5.safetensors", tensors)
    model = load_umt5(tmp_path / "t5.safetensors", device="cpu", fp8=True)
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items() if not name.endswith("scale")}
    assert dtypes == {name: FP8 if is_linear(name) else torch.bfloat16 for name in tensors}
    ids = torch.arange(2, 22)[None]
    exact, features = encoder(tensors)(ids), model(ids)
    assert features.dtype == torch.bfloat16
    assert (features.float() - exact).norm() < 0.1 * exact.norm()


def test_a_scale_per_row_keeps_small_rows_that_a_plain_cast_would_lose() -> None:
    weight = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0], [1e-4]])
    rows, scale = quantise_rows(weight)
    error = (rows.float() * scale[:, None] - weight).norm(dim=1) / weight.norm(dim=1)
    plain = (weight.to(FP8).float() - weight).norm(dim=1) / weight.norm(dim=1)
    assert error.max() < 0.04
    assert plain[1] > 0.9


def test_an_fp8_linear_multiplies_with_its_scaled_rows() -> None:
    torch.manual_seed(0)
    layer = RowFp8Linear(64, 3)
    layer.weight.data, layer.scale.data = quantise_rows(torch.randn(3, 64) * torch.tensor([[1.0], [1e-4], [1e4]]))
    x = torch.randn(5, 64)
    expected = x @ (layer.weight.float() * layer.scale[:, None]).T
    torch.testing.assert_close(layer(x), expected, rtol=1e-3, atol=0)
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_rows_of_zeros_stay_zeros() -> None:
    rows, scale = quantise_rows(torch.zeros(2, 4))
    assert torch.equal(rows.float() * scale[:, None], torch.zeros(2, 4))


@pytest.mark.parametrize("shape", [(), (1,), (4,), (4, 1), (4, 3), (4, 3, 1)])
def test_scales_of_every_usual_shape_are_applied(shape: tuple[int, ...]) -> None:
    weight = torch.randn(4, 6).to(FP8)
    scale = 1 + torch.rand(shape)
    columns = scale.reshape(-1, max(scale.numel() // 4, 1)).repeat_interleave(6 // max(scale.numel() // 4, 1), dim=1)
    assert torch.equal(dequantise(weight, scale), weight.float() * columns)


@pytest.mark.parametrize("shape", [(6,), (3, 2), (4, 4), (2,)])
def test_scales_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        dequantise(torch.zeros(4, 6, dtype=FP8), torch.ones(shape))


def test_other_quantisations_are_refused(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    name = "blocks.1.ffn.fc1.weight"
    extra = {name: torch.zeros_like(tensors[name], dtype=torch.int8), "blocks.1.ffn.fc1.weight_scale": torch.ones(1)}
    save_tensors(tmp_path / "t5.safetensors", {**tensors, **extra})
    with pytest.raises(CheckpointError, match=r"blocks.1.ffn.fc1.weight is quantised to int8"):
        load_umt5(tmp_path / "t5.safetensors", device="cpu")


@pytest.mark.parametrize("missing", ["token_embedding.weight", "blocks.0.attn.q.weight", "blocks.1.norm2.weight"])
def test_a_file_that_lacks_tensors_is_refused_with_their_names(
    tmp_path: Path, tensors: dict[str, Tensor], missing: str
) -> None:
    save_tensors(tmp_path / "t5.safetensors", {name: tensor for name, tensor in tensors.items() if name != missing})
    with pytest.raises(CheckpointError, match=missing):
        load_umt5(tmp_path / "t5.safetensors", device="cpu")


def test_unknown_tensors_are_refused(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    save_tensors(tmp_path / "t5.safetensors", {**tensors, "blocks.0.attn.q.bias": torch.zeros(24)})
    with pytest.raises(CheckpointError, match=r"1 unknown tensors \(blocks.0.attn.q.bias\)"):
        load_umt5(tmp_path / "t5.safetensors", device="cpu")


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (GOLDEN["dit21_t2v_1.3B"], "a Wan transformer (it belongs to --dit)"),
        (GOLDEN["vae21"], "the Wan 2.1 VAE (it belongs to --vae)"),
        (GOLDEN["clip"], "a CLIP image encoder"),
        (
            ["shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"],
            "a T5 text encoder of another model family (Wan needs UMT5)",
        ),
    ],
    ids=["dit", "vae", "clip", "t5"],
)
def test_other_files_are_recognised_and_refused(tmp_path: Path, names: list[str], kind: str) -> None:
    save_tensors(tmp_path / "file.safetensors", {name: torch.zeros(1) for name in names})
    with pytest.raises(CheckpointError) as caught:
        load_umt5(tmp_path / "file.safetensors", device="cpu")
    assert f"file.safetensors is {kind}" in str(caught.value)
    assert "--t5 needs the UMT5 text encoder" in str(caught.value)


def test_float16_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="overflows"):
        load_umt5(tmp_path / "t5.safetensors", device="cpu", dtype=torch.float16)
