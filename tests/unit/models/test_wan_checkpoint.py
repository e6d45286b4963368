"""A transformer saved in any layout loads to the same model; loading holds one tensor at a time."""

import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from wanlora.foundation import reading
from wanlora.foundation.errors import CheckpointError
from wanlora.foundation.tensor_files import SafetensorsSource
from wanlora.models.wan import checkpoint
from wanlora.models.wan.checkpoint import install_parameter, load_transformer
from wanlora.models.wan.keys import official_to_diffusers
from wanlora.models.wan.spec import WanSizes
from wanlora.models.wan.transformer import WanTransformer

SIZES = WanSizes(dim=128, ffn_dim=256, num_layers=2, freq_dim=32, text_dim=32)
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def weights() -> Tensors:
    """Random bfloat16 weights under official names."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in WanTransformer(SIZES).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    return {name: (torch.randn(shape, generator=generator) * 0.1).bfloat16() for name, shape in shapes.items()}


def load(path: Path, dtype: torch.dtype = torch.float32, **options: object) -> WanTransformer:
    return load_transformer(path, "t2v-14B", device="cpu", dtype=dtype, progress=False, **options)  # type: ignore[arg-type]


def velocity(model: WanTransformer) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 16, 1, 4, 4, generator=generator)
    out: Tensor = model(x, torch.tensor([700.0]), [torch.randn(3, 32, generator=generator)])
    return out


def expected(tensors: Tensors, dtype: torch.dtype = torch.float32) -> Tensor:
    """What a model filled by hand gives."""
    model = WanTransformer(SIZES, compute_dtype=dtype).requires_grad_(False)
    model.load_state_dict(tensors)
    return velocity(model)


def save_official(tensors: Tensors, folder: Path) -> Path:
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    return folder / "diffusion_pytorch_model.safetensors"


def save_shards(tensors: Tensors, folder: Path) -> Path:
    names = sorted(tensors)
    half = len(names) // 2
    for number, part in enumerate((names[:half], names[half:]), 1):
        path = folder / f"diffusion_pytorch_model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, path)
    return path


def save_pickle(tensors: Tensors, folder: Path) -> Path:
    torch.save(tensors, folder / "model.pth")
    return folder / "model.pth"


def save_repackaged(tensors: Tensors, folder: Path) -> Path:
    """One file with a prefix and a VAE beside the transformer."""
    prefixed = {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}
    save_file(prefixed | {"first_stage_model.conv1.weight": torch.ones(2)}, folder / "all_in_one.safetensors")
    return folder / "all_in_one.safetensors"


def save_diffusers(tensors: Tensors, folder: Path) -> Path:
    """With the stray norms that some releases carry."""
    renamed = {official_to_diffusers(name): tensor for name, tensor in tensors.items()}
    stray = {f"blocks.{n}.attn2.norm_added_q.weight": torch.ones(128) for n in range(2)}
    save_file(renamed | stray, folder / "diffusers.safetensors")
    return folder / "diffusers.safetensors"


LAYOUTS = [save_official, save_shards, save_pickle, save_repackaged, save_diffusers]


@pytest.mark.parametrize("save", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_layout_loads_to_the_same_model(
    save: Callable[[Tensors, Path], Path], dtype: torch.dtype, weights: Tensors, tmp_path: Path
) -> None:
    model = load(save(weights, tmp_path), dtype)
    assert torch.equal(velocity(model), expected(weights, dtype))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.compute_dtype == dtype
    assert model.blocks[0].self_attn.q.weight.dtype == dtype  # type: ignore[union-attr]


def is_block_linear(name: str) -> bool:
    return name.startswith("blocks.") and name.endswith(".weight") and "norm" not in name


def test_plain_fp8_is_cast_up(weights: Tensors, tmp_path: Path) -> None:
    stored = {name: w.to(torch.float8_e4m3fn) if is_block_linear(name) else w for name, w in weights.items()}
    model = load(save_official(stored, tmp_path))
    assert torch.equal(velocity(model), expected({name: tensor.float() for name, tensor in stored.items()}))


SCALES: dict[str, Callable[[int, int], tuple[int, ...]]] = {
    "scalar": lambda rows, columns: (),
    "one": lambda rows, columns: (1,),
    "rows": lambda rows, columns: (rows,),
    "column": lambda rows, columns: (rows, 1),
    "blocks": lambda rows, columns: (rows, columns // 64, 1),
    "tiles": lambda rows, columns: (rows // 128, columns // 128),
}


def scaled_fp8(
    weights: Tensors, scale_shape: Callable[[int, int], tuple[int, ...]]
) -> tuple[Tensors, Tensors, Tensors]:
    """Stored tensors, their scales by weight name, and the weights that are meant."""
    stored, scales, meant = dict(weights), {}, dict(weights)
    generator = torch.Generator().manual_seed(2)
    for name in filter(is_block_linear, weights):
        rows, columns = weights[name].shape
        scale = 0.5 + torch.rand(scale_shape(rows, columns), generator=generator)
        stored[name] = weights[name].to(torch.float8_e4m3fn)
        scales[name] = scale
        grid = scale.reshape(scale.shape[:2]) if scale.ndim > 1 else scale.reshape(-1, 1)
        full = torch.kron(grid, torch.ones(rows // grid.shape[0], columns // grid.shape[1]))
        meant[name] = stored[name].float() * full
    return stored, scales, meant


@pytest.mark.parametrize("kind", SCALES)
def test_scaled_fp8_of_comfyui_is_multiplied_out(kind: str, weights: Tensors, tmp_path: Path) -> None:
    stored, scales, meant = scaled_fp8(weights, SCALES[kind])
    extra = {name.removesuffix("weight") + "scale_weight": scale for name, scale in scales.items()}
    extra |= {name.removesuffix("weight") + "scale_input": torch.tensor(3.0) for name in scales}
    extra["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    prefixed = {f"model.diffusion_model.{name}": tensor for name, tensor in (stored | extra).items()}
    model = load(save_official(prefixed, tmp_path))
    assert torch.equal(velocity(model), expected(meant))


def test_the_newer_scaled_format_is_multiplied_out(weights: Tensors, tmp_path: Path) -> None:
    stored, scales, meant = scaled_fp8(weights, SCALES["scalar"])
    note = torch.frombuffer(bytearray(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    extra: Tensors = {}
    for name, scale in scales.items():
        stem = name.removesuffix("weight")
        extra |= {
            f"{stem}weight_scale": scale,
            f"{stem}input_scale": torch.tensor(2.0),
            f"{stem}comfy_quant": note.clone(),
        }
    assert torch.equal(velocity(load(save_official(stored | extra, tmp_path))), expected(meant))


def test_install_gets_fp8_weights_with_their_scales(weights: Tensors, tmp_path: Path) -> None:
    stored, scales, _ = scaled_fp8(weights, SCALES["rows"])
    extra = {name.removesuffix("weight") + "scale_weight": scale for name, scale in scales.items()}
    given: dict[str, tuple[torch.dtype, Tensor | None]] = {}

    def install(model: WanTransformer, name: str, tensor: Tensor, scale: Tensor | None) -> None:
        given[name] = (tensor.dtype, scale)
        install_parameter(model, name, tensor, scale)

    load(save_official(stored | extra, tmp_path), install=install)
    assert given.keys() == weights.keys()
    for name, (dtype, scale) in given.items():
        assert dtype == stored[name].dtype
        assert (scale is None) == (name not in scales)
        assert scale is None or torch.equal(scale, scales[name])


@pytest.mark.parametrize("quantised", [False, True])
def test_adjust_sees_plain_weights_under_official_names(quantised: bool, weights: Tensors, tmp_path: Path) -> None:
    stored, meant = weights, weights
    if quantised:
        stored, scales, meant = scaled_fp8(weights, SCALES["blocks"])
        stored = stored | {name.removesuffix("weight") + "scale_weight": scale for name, scale in scales.items()}
    target = "blocks.1.cross_attn.o.weight"

    def adjust(name: str, tensor: Tensor) -> Tensor:
        return tensor.float() + 1 if name == target else tensor

    model = load(save_diffusers(stored, tmp_path) if not quantised else save_official(stored, tmp_path), adjust=adjust)
    assert torch.equal(velocity(model), expected(meant | {target: meant[target].float() + 1}))


def test_float32_matrices_keep_16_bits_where_the_file_has_no_more(weights: Tensors, tmp_path: Path) -> None:
    model = load(save_official(weights, tmp_path), torch.bfloat16)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert dtypes["time_projection.1.weight"] == torch.bfloat16
    assert dtypes["blocks.0.modulation"] == dtypes["blocks.0.norm3.weight"] == torch.float32
    wide = load(save_official({name: tensor.float() for name, tensor in weights.items()}, tmp_path), torch.bfloat16)
    assert wide.get_parameter("time_projection.1.weight").dtype == torch.float32
    assert wide.get_parameter("blocks.0.ffn.0.weight").dtype == torch.bfloat16


def test_few_tensors_of_the_file_are_alive_at_a_time(
    weights: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: set[int] = set()
    most = []

    class Counting(SafetensorsSource):
        def read_all(self, *arguments: Any) -> Iterator[tuple[str, Tensor]]:
            for name, tensor in super().read_all(*arguments):
                alive.add(id(tensor))
                weakref.finalize(tensor, alive.discard, id(tensor))
                most.append(len(alive))
                yield name, tensor

    monkeypatch.setattr(checkpoint, "open_tensors", Counting)
    monkeypatch.setattr(reading, "_AHEAD", 0)
    model = load(save_official(weights, tmp_path), torch.bfloat16)
    assert len(most) == len(weights)
    assert max(most) <= 3  # the one in hand, the last one that is still named, and the next
    assert not alive
    assert torch.equal(velocity(model), expected(weights, torch.bfloat16))


def test_the_model_does_not_look_into_the_file(weights: Tensors, tmp_path: Path) -> None:
    path = save_pickle(weights, tmp_path)
    model = load(path, torch.bfloat16)
    before = velocity(model)
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    assert torch.equal(velocity(model), before)


def test_missing_and_unknown_tensors_are_listed_with_their_number(weights: Tensors, tmp_path: Path) -> None:
    changed = {name: tensor for name, tensor in weights.items() if not name.startswith("blocks.1.ffn")}
    changed["blocks.0.extra.weight"] = torch.ones(1)
    with pytest.raises(CheckpointError) as error:
        load(save_official(changed, tmp_path))
    message = str(error.value)
    assert "lacks 4 tensors (blocks.1.ffn.0.bias" in message
    assert "1 unknown tensors (blocks.0.extra.weight)" in message


def test_a_tensor_of_another_shape_is_named(weights: Tensors, tmp_path: Path) -> None:
    path = save_official({**weights, "blocks.1.ffn.0.bias": torch.ones(7)}, tmp_path)
    with pytest.raises(CheckpointError, match=r"blocks.1.ffn.0.bias is \(7,\) instead of \(256,\)"):
        load(path)


def test_an_install_that_forgets_a_tensor_is_found_out(weights: Tensors, tmp_path: Path) -> None:
    def forgetful(model: WanTransformer, name: str, tensor: Tensor, scale: Tensor | None) -> None:
        if name != "head.head.bias":
            install_parameter(model, name, tensor, scale)

    with pytest.raises(RuntimeError, match=r"head.head.bias"):
        load(save_official(weights, tmp_path), install=forgetful)


def test_options_reach_the_model(weights: Tensors, tmp_path: Path) -> None:
    model = load(save_official(weights, tmp_path), torch.bfloat16, residual_dtype=torch.bfloat16, attention="reference")
    assert model.residual_dtype == torch.bfloat16
    assert model.attention == "reference"
    assert isinstance(model.blocks, nn.ModuleList)
