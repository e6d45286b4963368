"""Our LoRA files in Diffusers: its own loader makes of them what we trained.

The same tiny transformer is built here and in Diffusers from the same weights; ours gets adapters that are saved,
theirs loads the file through `WanPipeline.load_lora_weights`. The change of the output must be the same.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from torch import Tensor

from tests.unit.lora.wan import SIZES, adapted_wan, inputs, tiny_wan
from wanlora.lora.files import read_lora, save_lora
from wanlora.lora.network import LoRANetwork
from wanlora.lora.targets import candidates
from wanlora.models.wan.keys import official_to_diffusers
from wanlora.models.wan.layers import pad_texts

FORMATS = ("kohya", "comfy", "diffusers")
ATTENTION_ONLY = (r".*self_attn\.[qv]$",)


def pipeline() -> Any:
    """Diffusers' pipeline around our tiny transformer's weights, with nothing else in it."""
    transformer = WanTransformer3DModel(
        num_attention_heads=SIZES.num_heads,
        attention_head_dim=SIZES.head_dim,
        in_channels=SIZES.in_channels,
        out_channels=SIZES.out_channels,
        text_dim=SIZES.text_dim,
        freq_dim=SIZES.freq_dim,
        ffn_dim=SIZES.ffn_dim,
        num_layers=SIZES.num_layers,
    )
    state = {official_to_diffusers(name): tensor.clone() for name, tensor in tiny_wan().state_dict().items()}
    transformer.load_state_dict(state)
    return WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=transformer.eval(),
    )


@torch.no_grad()
def ours(network: LoRANetwork) -> Tensor:
    """What the adapters change."""
    adapted = network.model(*inputs())
    with network.enabled(False):
        change: Tensor = adapted - network.model(*inputs())
    return change


@torch.no_grad()
def theirs(path: Path) -> Tensor:
    """What the file changes in Diffusers."""
    pipe = pipeline()
    latents, timestep, text = inputs()
    padded = pad_texts(text, SIZES.text_len, torch.device("cpu"), torch.float32)

    def run() -> Tensor:
        out: Tensor = pipe.transformer(latents, timestep, padded, return_dict=False)[0]
        return out

    before = run()
    pipe.load_lora_weights(path.parent, weight_name=path.name)
    return run() - before


def require_same(path: Path, network: LoRANetwork, tolerance: float = 1e-3) -> None:
    expected, got = ours(network), theirs(path)
    assert expected.norm() > 0.05
    assert float((got - expected).norm() / expected.norm()) < tolerance


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("alpha", [4.0, 1.0, 12.0])
def test_a_saved_lora_acts_in_diffusers_as_here(format: str, alpha: float, tmp_path: Path) -> None:
    network = adapted_wan(alpha=alpha)
    save_lora(tmp_path / "a.safetensors", network, format=format)
    require_same(tmp_path / "a.safetensors", network)


@pytest.mark.parametrize("format", ["comfy", "diffusers"])
def test_a_partial_selection_acts_in_diffusers_as_here(format: str, tmp_path: Path) -> None:
    network = adapted_wan(alpha=2.0, include=ATTENTION_ONLY)
    save_lora(tmp_path / "a.safetensors", network, format=format)
    require_same(tmp_path / "a.safetensors", network)


def test_bfloat16_files_act_as_here_up_to_rounding(tmp_path: Path) -> None:
    network = adapted_wan(alpha=1.0)
    save_lora(tmp_path / "a.safetensors", network, format="diffusers", dtype=torch.bfloat16)
    require_same(tmp_path / "a.safetensors", network, tolerance=2e-2)


def test_a_partial_kohya_file_is_what_diffusers_cannot_read(tmp_path: Path) -> None:
    """The reason for the warning that `save_lora` gives."""
    network = adapted_wan(include=ATTENTION_ONLY)
    save_lora(tmp_path / "a.safetensors", network, format="kohya")
    with pytest.raises(KeyError, match="self_attn_k"):
        theirs(tmp_path / "a.safetensors")


def test_a_lora_that_diffusers_saves_is_read_here(tmp_path: Path) -> None:
    from peft import LoraConfig

    pipe = pipeline()
    pipe.transformer.add_adapter(
        LoraConfig(r=3, lora_alpha=6, init_lora_weights=False, target_modules=["to_q", "ffn.net.2"])
    )
    layers = {name: tensor for name, tensor in pipe.transformer.state_dict().items() if ".lora_" in name}
    layers = {name.replace(".default", ""): tensor for name, tensor in layers.items()}
    WanPipeline.save_lora_weights(
        tmp_path, layers, transformer_lora_adapter_metadata=pipe.transformer.peft_config["default"].to_dict()
    )
    weights = read_lora(tmp_path / "pytorch_lora_weights.safetensors", candidates(tiny_wan()))
    assert set(weights) == {
        f"blocks.{block}.{tail}" for block in (0, 1) for tail in ("self_attn.q", "cross_attn.q", "ffn.2")
    }
    for given in weights.values():
        assert (given.rank, given.alpha) == (3, 6.0)
    module = pipe.transformer.blocks[1].attn2.to_q
    torch.testing.assert_close(weights["blocks.1.cross_attn.q"].delta(), module.get_delta_weight("default"))
