"""LoRA files merged into the base while it loads."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.unit.lora.wan import adapted_wan, inputs, tiny_wan
from wanlora.foundation.errors import CheckpointError, ConfigError
from wanlora.foundation.tensor_files import save_tensors
from wanlora.lora.files import save_lora
from wanlora.lora.merge import MergedLoRAs


def pass_through(model: nn.Module, adjust: MergedLoRAs) -> nn.Module:
    """What a loader does: every tensor goes through `adjust` once."""
    state = model.state_dict()
    model.load_state_dict({name: adjust(name, tensor) for name, tensor in state.items()})
    adjust.finish()
    return model


@pytest.mark.parametrize("format", ["kohya", "comfy", "diffusers"])
@pytest.mark.parametrize(("alpha", "multiplier"), [(4.0, 1.0), (1.0, 0.7), (8.0, -1.0)])
def test_a_merged_lora_acts_like_the_adapter(format: str, alpha: float, multiplier: float, tmp_path: Path) -> None:
    network = adapted_wan(alpha=alpha)
    save_lora(tmp_path / "a.safetensors", network, format=format)
    network.set_multiplier(multiplier)
    merged = pass_through(tiny_wan(), MergedLoRAs([tmp_path / "a.safetensors"], [multiplier]))
    torch.testing.assert_close(merged(*inputs()), network.model(*inputs()), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(merged(*inputs()), tiny_wan()(*inputs()), rtol=1e-2)


def test_files_add_up_and_missing_multipliers_are_one(tmp_path: Path) -> None:
    deltas = []
    for seed in (0, 5):
        network = adapted_wan(seed=seed)
        save_lora(tmp_path / f"{seed}.safetensors", network)
        deltas.append(network.weights()["blocks.0.ffn.0"].delta())
    adjust = MergedLoRAs([tmp_path / "0.safetensors", tmp_path / "5.safetensors"], [0.5])
    merged = adjust("blocks.0.ffn.0.weight", torch.zeros(96, 64, dtype=torch.bfloat16))
    assert merged.dtype == torch.float32
    torch.testing.assert_close(merged, 0.5 * deltas[0] + deltas[1])


def test_tensors_without_an_update_pass_unchanged(tmp_path: Path) -> None:
    save_lora(tmp_path / "a.safetensors", adapted_wan(include=(".*ffn",)))
    adjust = MergedLoRAs([tmp_path / "a.safetensors"])
    for name in ("blocks.0.self_attn.q.weight", "blocks.0.ffn.0.bias", "blocks.0.modulation", "head.head.weight"):
        tensor = torch.ones(3, dtype=torch.bfloat16)
        assert adjust(name, tensor) is tensor


def differences(path: Path, **extra: Tensor) -> Path:
    save_tensors(path, {f"diffusion_model.{name}": tensor for name, tensor in extra.items()})
    return path


def test_whole_differences_of_weights_and_biases_are_added(tmp_path: Path) -> None:
    extra = {"blocks.0.ffn.0.diff_b": torch.full((96,), 2.0), "blocks.1.norm3.diff": torch.full((64,), 3.0)}
    model = tiny_wan()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adjust = MergedLoRAs([differences(tmp_path / "a.safetensors", **extra)], [0.5])
    after = pass_through(model, adjust).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"blocks.0.ffn.0.bias", "blocks.1.norm3.weight"}
    torch.testing.assert_close(after["blocks.0.ffn.0.bias"], before["blocks.0.ffn.0.bias"] + 1.0)
    torch.testing.assert_close(after["blocks.1.norm3.weight"], before["blocks.1.norm3.weight"] + 1.5)


def test_what_found_no_tensor_is_refused_after_loading(tmp_path: Path) -> None:
    path = differences(tmp_path / "a.safetensors", **{"blocks.9.ffn.0.diff_b": torch.ones(96)})
    with pytest.raises(CheckpointError, match=r"a\.safetensors: 1 of its modules .*blocks\.9\.ffn\.0\.diff_b"):
        pass_through(tiny_wan(), MergedLoRAs([path]))


def test_files_that_do_not_fit_are_found_before_loading(tmp_path: Path) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tiny_wan().named_parameters()}
    extra = {"blocks.0.ffn.0.diff_b": torch.ones(96), "blocks.1.norm3.diff": torch.ones(64)}
    good = differences(tmp_path / "good.safetensors", **extra)
    save_lora(tmp_path / "lora.safetensors", adapted_wan())
    MergedLoRAs([good, tmp_path / "lora.safetensors"]).check(shapes)
    bad = differences(tmp_path / "bad.safetensors", **extra, **{"blocks.9.ffn.0.diff_b": torch.ones(96)})
    with pytest.raises(CheckpointError, match=r"bad\.safetensors: 1 of its modules .*blocks\.9\.ffn\.0\.diff_b"):
        MergedLoRAs([good, bad]).check(shapes)


def test_an_update_of_another_size_is_refused(tmp_path: Path) -> None:
    save_lora(tmp_path / "a.safetensors", adapted_wan())
    adjust = MergedLoRAs([tmp_path / "a.safetensors"])
    with pytest.raises(CheckpointError, match=r"another model: its lora_unet_blocks_0_ffn_0 .*\[96, 64\]"):
        adjust("blocks.0.ffn.0.weight", torch.zeros(96, 65))


def test_more_multipliers_than_files_are_refused() -> None:
    with pytest.raises(ConfigError, match="2 values for 0 files"):
        MergedLoRAs([], [1.0, 0.5])
