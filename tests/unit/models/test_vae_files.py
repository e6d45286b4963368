"""Which files are read as the Wan 2.1 VAE, and what is said of the others."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from wanlora.foundation.errors import CheckpointError
from wanlora.foundation.tensor_files import save_tensors
from wanlora.models.wan.recognise import describe
from wanlora.models.wan.vae import VAESizes, WanVAE, load_vae
from wanlora.models.wan.vae_keys import diffusers_name

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "wan-key-shapes.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    """The state of a small autoencoder with 6 latent channels."""
    torch.manual_seed(0)
    return {name: torch.randn_like(tensor) for name, tensor in WanVAE(VAESizes(base=8, z=6)).state_dict().items()}


def assert_holds(vae: WanVAE, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    assert vae.sizes == VAESizes(base=8, z=6)
    state = vae.state_dict()
    assert state.keys() == tensors.keys()
    assert all(torch.equal(state[name], tensor.to(dtype)) for name, tensor in tensors.items())
    assert not any(parameter.requires_grad for parameter in vae.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_official_names_load_from_safetensors(tmp_path: Path, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    save_tensors(tmp_path / "wan_2.1_vae.safetensors", tensors)
    assert_holds(load_vae(tmp_path / "wan_2.1_vae.safetensors", device="cpu", dtype=dtype), tensors, dtype)


def test_official_names_load_from_pth(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    torch.save(tensors, tmp_path / "Wan2.1_VAE.pth")
    assert_holds(load_vae(tmp_path / "Wan2.1_VAE.pth", device="cpu"), tensors, torch.float32)


def test_diffusers_names_load(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    save_tensors(path, {diffusers_name(name): tensor for name, tensor in tensors.items()})
    vae = load_vae(path, device="cpu", cache_on_cpu=True)
    assert_holds(vae, tensors, torch.float32)
    assert vae.cache_on_cpu


def test_a_file_that_lacks_tensors_is_refused_with_their_names(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    path = tmp_path / "vae.safetensors"
    save_tensors(path, {name: tensor for name, tensor in tensors.items() if name != "decoder.conv1.bias"})
    with pytest.raises(CheckpointError, match=r"vae.safetensors .*lacks 1 tensors \(decoder.conv1.bias\)"):
        load_vae(path, device="cpu")


def test_a_tensor_of_another_shape_is_refused_with_both_shapes(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    path = tmp_path / "vae.safetensors"
    save_tensors(path, {**tensors, "conv1.bias": torch.zeros(5)})
    with pytest.raises(CheckpointError, match=r"conv1.bias is \(5,\) instead of \(12,\)"):
        load_vae(path, device="cpu")


STRANGERS = {
    "a Wan transformer (it belongs to --dit)": GOLDEN["dit21_t2v_1.3B"],
    "the UMT5 text encoder (it belongs to --t5)": GOLDEN["umt5"],
    "the Wan 2.2 VAE, which serves the TI2V-5B model only": GOLDEN["vae22"],
    "a CLIP image encoder (it belongs to --clip)": GOLDEN["clip"],
    "a LoRA (it belongs to --network_weights or --base_weights)": ["lora_unet_blocks_0_self_attn_q.lora_down.weight"],
    "a VAE of another model family (Stable Diffusion, Flux and others name theirs so)": [
        "encoder.down.0.block.0.conv1.weight"
    ],
}


@pytest.mark.parametrize("kind", STRANGERS)
def test_other_files_are_recognised_and_refused(tmp_path: Path, kind: str) -> None:
    save_tensors(tmp_path / "file.safetensors", {name: torch.zeros(1) for name in STRANGERS[kind]})
    with pytest.raises(CheckpointError) as caught:
        load_vae(tmp_path / "file.safetensors", device="cpu")
    assert f"file.safetensors is {kind}; --vae needs the Wan 2.1 VAE" in str(caught.value)


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model."])
def test_prefixes_do_not_hide_a_transformer(prefix: str) -> None:
    assert describe(prefix + name for name in GOLDEN["dit21_i2v_14B"]).startswith("is a Wan transformer")


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (GOLDEN["vae21"], "is the Wan 2.1 VAE"),
        ([diffusers_name(name) for name in GOLDEN["vae21"]], "is the Wan 2.1 VAE"),
        (["encoder.down_blocks.0.resnets.0.norm1.gamma"], "is the Wan 2.2 VAE"),
        (["encoder.down_blocks.0.resnets.0.conv1.weight"], "is a VAE of another model family"),
        (["model.diffusion_model.input_blocks.0.0.weight"], "is a Stable Diffusion checkpoint"),
        (["encoder.block.0.layer.0.SelfAttention.q.weight"], "is a T5 text encoder of another model family"),
        (["condition_embedder.text_embedder.linear_1.weight"], "is a Wan transformer"),
        (["a", "b"], "is of no kind known here (its first tensors: a, b)"),
    ],
)
def test_kinds_are_told_by_names(names: list[str], kind: str) -> None:
    assert describe(names).startswith(kind)
