"""Names in files: Diffusers' and ours map one to one, prefixes are found, strangers are not."""

import json
from pathlib import Path

import pytest

from wanlora.models.wan.keys import diffusers_to_official, find_prefix, official_to_diffusers

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "wan-key-shapes.json").read_text(encoding="utf-8"))
DITS = [name for name in GOLDEN if name.startswith(("dit", "vace"))]


@pytest.mark.parametrize("model", DITS)
def test_every_official_name_maps_to_a_name_of_its_own_and_back(model: str) -> None:
    theirs = [official_to_diffusers(name) for name in GOLDEN[model]]
    assert len(set(theirs)) == len(theirs)
    assert [diffusers_to_official(name) for name in theirs] == list(GOLDEN[model])


@pytest.mark.parametrize(
    ("official", "diffusers"),
    [
        ("blocks.7.self_attn.o", "blocks.7.attn1.to_out.0"),
        ("blocks.7.cross_attn.k_img.weight", "blocks.7.attn2.add_k_proj.weight"),
        ("blocks.7.norm3.bias", "blocks.7.norm2.bias"),
        ("blocks.7.ffn.0.weight", "blocks.7.ffn.net.0.proj.weight"),
        ("blocks.7.modulation", "blocks.7.scale_shift_table"),
        ("head.modulation", "scale_shift_table"),
        ("head.head.bias", "proj_out.bias"),
        ("vace_blocks.1.after_proj.weight", "vace_blocks.1.proj_out.weight"),
        ("time_projection.1", "condition_embedder.time_proj"),
        ("patch_embedding.weight", "patch_embedding.weight"),
    ],
)
def test_tensors_and_modules_are_translated_both_ways(official: str, diffusers: str) -> None:
    assert official_to_diffusers(official) == diffusers
    assert diffusers_to_official(diffusers) == official


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model.", "transformer.", "my.own."])
@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_any_prefix_is_found(prefix: str, layout: str) -> None:
    names = list(GOLDEN["dit21_t2v_1.3B"])
    if layout == "diffusers":
        names = [official_to_diffusers(name) for name in names]
    assert find_prefix([prefix + name for name in names]) == (prefix, layout)


@pytest.mark.parametrize("model", ["umt5", "clip", "vae21", "vae22"])
def test_other_files_have_no_transformer(model: str) -> None:
    assert find_prefix(GOLDEN[model]) is None
