"""Reading LoRA files in every spelling, and refusing what is none."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.unit.lora.wan import adapted_wan
from wanlora.foundation.errors import CheckpointError
from wanlora.foundation.tensor_files import save_tensors
from wanlora.lora.files import read_lora, shapes_from_weights
from wanlora.lora.spelling import resolve, spellings_of
from wanlora.lora.targets import candidates
from wanlora.models.wan.keys import official_to_diffusers

Q, FFN = "blocks.1.self_attn.q", "blocks.0.ffn.0"
MODULES = candidates(adapted_wan().model)
WIDTHS = {Q: (64, 64), FFN: (64, 96)}


def factors(module: str, rank: int = 2) -> tuple[Tensor, Tensor]:
    columns, rows = WIDTHS[module]
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator)


def write(path: Path, names: dict[str, str], down: str, up: str, **extra: Tensor) -> Path:
    """A file with the factors of `names` (official path to the name in the file)."""
    tensors = dict(extra)
    for module, name in names.items():
        tensors[f"{name}.{down}.weight"], tensors[f"{name}.{up}.weight"] = factors(module)
    save_tensors(path, tensors)
    return path


NAMES = {
    "kohya": lambda path: "lora_unet_" + path.replace(".", "_"),
    "kohya, double underscore": lambda path: "lora_unet__" + path.replace(".", "_"),
    "comfy": lambda path: "diffusion_model." + path,
    "bare": lambda path: path,
    "diffusers": lambda path: "transformer." + official_to_diffusers(path),
    "peft": lambda path: "base_model.model." + path,
    "peft of diffusers": lambda path: "base_model.model." + official_to_diffusers(path),
    "kohya of diffusers": lambda path: "lora_transformer_" + official_to_diffusers(path).replace(".", "_"),
}
FACTORS = [
    ("lora_down", "lora_up"),
    ("lora_A", "lora_B"),
    ("lora_A.default", "lora_B.default"),
    ("lora.down", "lora.up"),
]


@pytest.mark.parametrize("spelling", NAMES)
@pytest.mark.parametrize(("down", "up"), FACTORS)
def test_every_spelling_is_recognised(spelling: str, down: str, up: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {module: NAMES[spelling](module) for module in (Q, FFN)}, down, up)
    weights = read_lora(path, MODULES)
    assert set(weights) == {Q, FFN}
    for module, given in weights.items():
        assert torch.equal(given.down, factors(module)[0]) and torch.equal(given.up, factors(module)[1])
        assert (given.rank, given.alpha) == (2, 2.0)


def test_alpha_is_read(tmp_path: Path) -> None:
    name = NAMES["kohya"](Q)
    path = write(tmp_path / "a.safetensors", {Q: name}, "lora_down", "lora_up", **{f"{name}.alpha": torch.tensor(0.5)})
    given = read_lora(path, MODULES)[Q]
    assert (given.alpha, given.scale) == (0.5, 0.25)
    down, up = factors(Q)
    torch.testing.assert_close(given.delta(), 0.25 * up @ down)


@pytest.mark.parametrize(
    ("config", "alpha"),
    [
        ({"transformer.lora_alpha": 8, "transformer.r": 2}, 8.0),
        ({"transformer.lora_alpha": 8, "transformer.alpha_pattern": {"blocks.1.attn1.to_q": 6}}, 6.0),
        ({"transformer.lora_alpha": 8, "transformer.use_rslora": True}, 8 * 2**0.5),
    ],
)
def test_alpha_in_peft_metadata_is_read(config: dict[str, object], alpha: float, tmp_path: Path) -> None:
    name, (down, up) = NAMES["diffusers"](Q), factors(Q)
    save_tensors(
        tmp_path / "a.safetensors",
        {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up},
        {"lora_adapter_metadata": json.dumps(config)},
    )
    assert read_lora(tmp_path / "a.safetensors", MODULES)[Q].alpha == pytest.approx(alpha)


def test_names_with_underscores_and_digits_are_resolved_by_the_model() -> None:
    modules = [f"blocks.{n}.cross_attn.{part}" for n in (1, 11) for part in ("k", "k_img")]
    spelled = {path: "lora_unet_" + path.replace(".", "_") for path in modules}
    assert resolve(spelled.values(), modules) == {name: path for path, name in spelled.items()}


def test_no_two_modules_of_the_largest_model_share_a_spelling() -> None:
    tails = [f"{kind}_attn.{part}" for kind in ("self", "cross") for part in "qkvo"]
    tails += ["cross_attn.k_img", "cross_attn.v_img", "ffn.0", "ffn.2"]
    modules = [f"blocks.{n}.{tail}" for n in range(40) for tail in tails]
    owners: dict[str, str] = {}
    for path in modules:
        for name in spellings_of(path):
            assert owners.setdefault(name, path) == path


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("lora_unet_blocks_0_ffn_0.hada_w1_a", "LoHa"),
        ("lora_unet_blocks_0_ffn_0.lokr_w1", "LoKr"),
        ("diffusion_model.blocks.0.ffn.0.dora_scale", "DoRA"),
        ("base_model.model.blocks.0.ffn.0.lora_magnitude_vector.default.weight", "DoRA"),
    ],
)
def test_other_kinds_are_refused_by_name(key: str, kind: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {Q: NAMES["kohya"](Q)}, "lora_down", "lora_up", **{key: torch.ones(2, 2)})
    with pytest.raises(CheckpointError, match=rf"is a {kind} file"):
        read_lora(path, MODULES)


def test_modules_of_another_model_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {Q: "lora_unet_blocks_7_self_attn_q"}, "lora_down", "lora_up")
    with pytest.raises(CheckpointError, match=r"1 of its modules are not in this model \(lora_unet_blocks_7_self"):
        read_lora(path, MODULES)


def test_keys_that_are_no_loras_are_named(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.safetensors", {Q: NAMES["comfy"](Q)}, "lora_A", "lora_B", **{"style.embedding": torch.ones(2)}
    )
    with pytest.raises(CheckpointError, match=r"1 of 3 keys are not those of a LoRA \(style\.embedding\)"):
        read_lora(path, MODULES)


def test_a_module_with_one_factor_is_no_whole_file(tmp_path: Path) -> None:
    save_tensors(tmp_path / "a.safetensors", {NAMES["kohya"](Q) + ".lora_up.weight": factors(Q)[1]})
    with pytest.raises(CheckpointError, match="not whole"):
        read_lora(tmp_path / "a.safetensors", MODULES)


def test_factors_that_do_not_fit_each_other_are_refused(tmp_path: Path) -> None:
    name = NAMES["kohya"](Q)
    save_tensors(
        tmp_path / "a.safetensors",
        {f"{name}.lora_down.weight": factors(Q, 2)[0], f"{name}.lora_up.weight": factors(Q, 3)[1]},
    )
    with pytest.raises(CheckpointError, match=r"\[2, 64\] and \[64, 3\]"):
        read_lora(tmp_path / "a.safetensors", MODULES)


def test_one_module_in_two_spellings_or_two_adapters_is_refused(tmp_path: Path) -> None:
    down, up = factors(Q)
    extra = {f"{NAMES['comfy'](Q)}.lora_A.weight": down, f"{NAMES['comfy'](Q)}.lora_B.weight": up}
    path = write(tmp_path / "a.safetensors", {Q: NAMES["kohya"](Q)}, "lora_down", "lora_up", **extra)
    with pytest.raises(CheckpointError, match="twice"):
        read_lora(path, MODULES)
    path = write(
        tmp_path / "b.safetensors",
        {Q: NAMES["comfy"](Q)},
        "lora_A.default",
        "lora_B.default",
        **{f"{NAMES['comfy'](Q)}.lora_A.other.weight": down},
    )
    with pytest.raises(CheckpointError, match="two adapters"):
        read_lora(path, MODULES)


def test_whole_differences_cannot_be_gone_on_from(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.safetensors",
        {Q: NAMES["comfy"](Q)},
        "lora_A",
        "lora_B",
        **{"diffusion_model.blocks.0.ffn.0.diff_b": torch.ones(96)},
    )
    with pytest.raises(CheckpointError, match="--base_weights"):
        read_lora(path, MODULES)


def test_an_empty_file_is_no_lora(tmp_path: Path) -> None:
    save_tensors(tmp_path / "a.safetensors", {}, {"format": "pt"})
    with pytest.raises(CheckpointError, match="holds no LoRA"):
        read_lora(tmp_path / "a.safetensors", MODULES)


def test_ranks_and_alphas_come_from_the_file(tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {}
    for module, rank in ((Q, 3), (FFN, 5)):
        name, (down, up) = NAMES["kohya"](module), factors(module, rank)
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(1.5)}
    save_tensors(tmp_path / "a.safetensors", tensors)
    assert shapes_from_weights(tmp_path / "a.safetensors", MODULES) == ({Q: 3, FFN: 5}, {Q: 1.5, FFN: 1.5})
