"""Writing LoRA files: what they hold, and that a bad one is never left behind."""

import hashlib
import logging
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from tests.unit.lora.wan import adapted_wan
from wanlora.foundation.errors import CheckpointError, ConfigError
from wanlora.lora import files
from wanlora.lora.files import read_lora, save_lora
from wanlora.lora.spelling import SPELLINGS
from wanlora.lora.targets import candidates
from wanlora.lora.weights import LoRAWeights

FORMATS = ("kohya", "comfy", "diffusers")
EXPECTED = {
    "kohya": ("lora_unet_blocks_0_ffn_2", "lora_down", "lora_up"),
    "comfy": ("diffusion_model.blocks.0.ffn.2", "lora_A", "lora_B"),
    "diffusers": ("transformer.blocks.0.ffn.net.2", "lora_A", "lora_B"),
}


def content(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata())  # noqa: SIM118


@pytest.mark.parametrize("format", FORMATS)
def test_keys_are_those_of_the_spelling(format: str, tmp_path: Path) -> None:
    save_lora(tmp_path / "a.safetensors", adapted_wan(), format=format)
    tensors, _ = content(tmp_path / "a.safetensors")
    module, down, up = EXPECTED[format]
    assert tensors[f"{module}.{down}.weight"].shape == (4, 96)
    assert tensors[f"{module}.{up}.weight"].shape == (64, 4)
    assert len(tensors) == 20 * (2 if format == "diffusers" else 3)
    if format != "diffusers":
        assert tensors[f"{module}.alpha"].shape == () and tensors[f"{module}.alpha"].item() == 4


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("alpha", [4.0, 0.3, 16.0])
def test_a_saved_file_reads_back_with_the_same_effect(
    format: str, dtype: torch.dtype, alpha: float, tmp_path: Path
) -> None:
    network = adapted_wan(alpha=alpha)
    save_lora(tmp_path / "a.safetensors", network, format=format, dtype=dtype)
    stored = read_lora(tmp_path / "a.safetensors", candidates(network.model))
    assert set(stored) == set(network.adapters)
    tolerance = 4 * torch.finfo(dtype).eps
    for name, live in network.weights().items():
        assert stored[name].down.dtype == dtype
        difference = (stored[name].delta() - live.delta()).norm() / live.delta().norm()
        assert float(difference) < tolerance


def test_an_untrained_network_and_tiny_weights_can_be_saved_in_half_precision(tmp_path: Path) -> None:
    save_lora(tmp_path / "a.safetensors", adapted_wan(strength=0.0), dtype=torch.float16)
    save_lora(tmp_path / "a.safetensors", adapted_wan(strength=1e-8, alpha=1), dtype=torch.float16)
    save_lora(tmp_path / "a.safetensors", adapted_wan(strength=1e-8, alpha=1), dtype=torch.float16, format="diffusers")


def test_an_unknown_format_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'diffusers'"):
        save_lora(Path("never.safetensors"), adapted_wan(), format="diffuser")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_saved_over_good_ones(bad: float, tmp_path: Path) -> None:
    path, network = tmp_path / "a.safetensors", adapted_wan()
    save_lora(path, network)
    before = path.read_bytes()
    network.adapters["blocks.1.ffn.0"].lora_up.weight.data[3, 2] = bad
    with pytest.raises(CheckpointError, match=r"not written: 1 of 60.*lora_unet_blocks_1_ffn_0\.lora_up"):
        save_lora(path, network)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_weights_too_large_for_the_format_are_not_saved(tmp_path: Path) -> None:
    network = adapted_wan()
    network.adapters["blocks.1.ffn.0"].lora_up.weight.data[0, 0] = 1e6
    with pytest.raises(CheckpointError, match="--save_precision"):
        save_lora(tmp_path / "a.safetensors", network, dtype=torch.float16)
    assert not list(tmp_path.iterdir())


def test_a_file_that_comes_back_different_gets_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        key = next(key for key in tensors if key.endswith("blocks_1_ffn_0.lora_up.weight"))
        save_tensors(path, {**tensors, key: tensors[key] * 1.1}, metadata)

    save_tensors = files.save_tensors
    monkeypatch.setattr(files, "save_tensors", damaged)
    with pytest.raises(CheckpointError, match=r"the update of blocks\.1\.ffn\.0 differs by up to"):
        save_lora(tmp_path / "a.safetensors", adapted_wan())
    assert not list(tmp_path.iterdir())


def test_a_file_that_lost_a_module_gets_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def shortened(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        save_tensors(path, {key: value for key, value in tensors.items() if "blocks_1_ffn_0" not in key}, metadata)

    save_tensors = files.save_tensors
    monkeypatch.setattr(files, "save_tensors", shortened)
    with pytest.raises(CheckpointError, match=r"not hold the same modules \(blocks\.1\.ffn\.0\)"):
        save_lora(tmp_path / "a.safetensors", adapted_wan())


def test_the_console_says_how_many_modules_map(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "wanlora"):
        save_lora(tmp_path / "a.safetensors", adapted_wan(), format="comfy", dtype=torch.bfloat16)
    assert "a.safetensors (comfy, bfloat16); 20/20 modules map to the model" in caplog.text


def test_a_partial_kohya_file_is_said_to_be_unreadable_for_diffusers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    network = adapted_wan(include=(".*ffn",))
    with caplog.at_level(logging.WARNING, "wanlora"):
        save_lora(tmp_path / "a.safetensors", network, format="comfy")
        assert not caplog.records
        save_lora(tmp_path / "a.safetensors", network, format="kohya")
    assert "--save_format diffusers" in caplog.text


def test_metadata_and_hashes_are_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_lora(path, adapted_wan(), metadata={"ss_seed": "7", "modelspec.title": "style"})
    _, metadata = content(path)
    assert metadata["ss_seed"] == "7" and metadata["modelspec.title"] == "style"
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    assert metadata["sshs_model_hash"] == hashlib.sha256(data[start:]).hexdigest()


def test_alpha_stays_exact_in_a_bfloat16_file(tmp_path: Path) -> None:
    save_lora(tmp_path / "a.safetensors", adapted_wan(alpha=0.3), dtype=torch.bfloat16)
    weights = read_lora(tmp_path / "a.safetensors", candidates(adapted_wan().model))
    assert weights["blocks.0.ffn.0"].alpha == pytest.approx(0.3, rel=1e-6)


def test_folding_alpha_leaves_the_live_weights_alone() -> None:
    weights = LoRAWeights(torch.ones(2, 3), torch.ones(4, 2), alpha=1.0)
    tensors = SPELLINGS.get("diffusers").tensors({"blocks.0.ffn.0": weights}, torch.float32)
    assert torch.equal(tensors["transformer.blocks.0.ffn.net.0.proj.lora_B.weight"], torch.full((4, 2), 0.5))
    assert torch.equal(weights.up, torch.ones(4, 2))
