"""What LoRA files say about themselves."""

import hashlib
import json
from typing import Any

import pytest
import safetensors.torch
import torch

from networks import lora_wan
from wanlora.lora.metadata import RUN_KEYS, lora_metadata, model_hashes

RUN: dict[str, Any] = {
    "output_name": "style_v01",
    "network_module": "networks.lora_wan",
    "network_dim": 32,
    "network_alpha": 16.0,
    "network_args": {"loraplus_lr_ratio": "4"},
    "learning_rate": 5e-5,
    "task": "t2v-14B",
    "fp8_scaled": True,
    "datasets": [{"resolution": [768, 416]}],
}


def test_values_are_text_and_absent_ones_are_none() -> None:
    metadata = lora_metadata(RUN)
    assert all(isinstance(value, str) for value in metadata.values())
    assert metadata["ss_network_dim"] == "32"
    assert metadata["ss_network_alpha"] == "16.0"
    assert metadata["ss_learning_rate"] == "5e-05"
    assert metadata["ss_fp8_scaled"] == "True"
    assert metadata["ss_task"] == "t2v-14B"
    assert metadata["ss_seed"] == "None"
    assert metadata["ss_base_model_version"] == "wan"
    assert json.loads(metadata["ss_datasets"]) == RUN["datasets"]
    assert json.loads(metadata["ss_network_args"]) == RUN["network_args"]


def test_every_run_key_is_written_and_network_args_only_if_given() -> None:
    assert {f"ss_{key}" for key in RUN_KEYS} <= set(lora_metadata(RUN))
    assert "ss_network_args" not in lora_metadata({})


def test_model_spec() -> None:
    metadata = lora_metadata(RUN, spec={"author": "me", "tags": None})
    assert metadata["modelspec.sai_model_spec"] == "1.0.0"
    assert metadata["modelspec.architecture"] == "wan2.1/lora"
    assert metadata["modelspec.title"] == "style_v01"
    assert metadata["modelspec.resolution"] == "1280x720"
    assert metadata["modelspec.author"] == "me" and "modelspec.tags" not in metadata
    assert "modelspec.timestep_range" not in metadata
    given = lora_metadata(RUN, title="T", architecture="wan2.2/lora", resolution="640x640")
    assert given["modelspec.title"] == "T"
    assert given["modelspec.architecture"] == "wan2.2/lora"
    assert given["modelspec.resolution"] == "640x640"


@pytest.mark.parametrize(("low", "high", "text"), [(0, 500, "0,500"), (None, 900, "0,900"), (100, None, "100,1000")])
def test_a_limited_timestep_range_is_named(low: int | None, high: int | None, text: str) -> None:
    metadata = lora_metadata({**RUN, "min_timestep": low, "max_timestep": high})
    assert metadata["modelspec.timestep_range"] == text
    assert (metadata["ss_min_timestep"], metadata["ss_max_timestep"]) == (str(low), str(high))


def test_minimal_metadata_keep_what_loaders_need() -> None:
    ss = {key: value for key, value in lora_metadata(RUN, minimal=True).items() if key.startswith("ss_")}
    assert ss == {
        "ss_base_model_version": "wan",
        "ss_network_module": "networks.lora_wan",
        "ss_network_dim": "32",
        "ss_network_alpha": "16.0",
        "ss_network_args": '{"loraplus_lr_ratio": "4"}',
    }


def test_an_unknown_key_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="lerning_rate"):
        lora_metadata({"lerning_rate": 1.0})


def test_hashes_are_those_of_the_file_with_training_metadata_alone() -> None:
    tensors = {"a": torch.arange(600_000, dtype=torch.float32), "b": torch.ones(3)}
    data = safetensors.torch.save(tensors, {"ss_seed": "1"})
    assert len(data) > 0x110000
    hashes = model_hashes(tensors, {"ss_seed": "1", "modelspec.title": "not counted"})
    assert hashes["sshs_legacy_hash"] == hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]
    start = 8 + int.from_bytes(data[:8], "little")
    assert hashes["sshs_model_hash"] == hashlib.sha256(data[start:]).hexdigest()


def test_the_legacy_hash_of_a_small_file_is_that_of_nothing() -> None:
    assert model_hashes({"a": torch.ones(2)}, {})["sshs_legacy_hash"] == hashlib.sha256(b"").hexdigest()[:8]


def test_the_network_module_users_name_has_everything() -> None:
    assert all(hasattr(lora_wan, name) for name in lora_wan.__all__)
    assert {"include_patterns", "exclude_patterns", "rank_dropout", "loraplus_lr_ratio", "conv_dim"} <= set(
        lora_wan.NETWORK_ARGS
    )
