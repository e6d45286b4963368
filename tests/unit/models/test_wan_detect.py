"""Every member of the family is recognised by its header; a file that the task does not train is refused in words."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from wanlora.foundation.errors import CheckpointError, ConfigError
from wanlora.foundation.tensor_files import TensorSource
from wanlora.models.wan.checkpoint import check_task, inspect_transformer
from wanlora.models.wan.keys import official_to_diffusers
from wanlora.models.wan.spec import FUTURE_TASKS, TASKS, WanSizes, task_spec
from wanlora.models.wan.transformer import WanTransformer

Shapes = dict[str, tuple[int, ...]]

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "wan-key-shapes.json").read_text(encoding="utf-8"))


class Header(TensorSource):
    """A file of which only the header is looked at."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], path: str = "file.safetensors") -> None:
        self.path = Path(path)
        self.metadata = {}
        self._shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.names = tuple(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return torch.uint8 if name.endswith("int4_like.weight") else torch.bfloat16

    def read(self, name: str) -> Tensor:
        raise AssertionError(f"{name} was read")

    def close(self) -> None:
        pass


def golden(model: str) -> Shapes:
    return {name: tuple(shape) for name, shape in GOLDEN[model].items()}


def t2v(sizes: WanSizes) -> Shapes:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in WanTransformer(sizes).state_dict().items()}


def with_input(shapes: Shapes, channels: int, *extra: str) -> Shapes:
    """The same with another number of input channels and some tensors more."""
    dim = shapes["patch_embedding.weight"][0]
    changed: Shapes = {**shapes, "patch_embedding.weight": (dim, channels, 1, 2, 2)}
    return changed | dict.fromkeys(extra, (1,))


T2V_14B = t2v(TASKS["t2v-14B"].sizes)
FAMILIES = {
    "t2v": T2V_14B,
    "i2v": golden("dit21_i2v_14B"),
    "flf2v": golden("dit21_flf2v_14B"),
    "ti2v-5B": golden("dit22_ti2v_5B"),
    "vace": golden("vace_1.3B"),
    "fun-control": with_input(golden("dit21_i2v_14B"), 48),
    "fun-camera": with_input(golden("dit21_i2v_14B"), 32, "control_adapter.conv.weight"),
    "fun-control-A14B": with_input(T2V_14B, 52, "ref_conv.weight"),
    "i2v-A14B": with_input(T2V_14B, 36),
    "animate": with_input(golden("dit21_i2v_14B"), 36, "motion_encoder.dec.direction.weight"),
    "s2v": with_input(T2V_14B, 16, "casual_audio_encoder.weights"),
    "unknown": with_input(T2V_14B, 20),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_the_family_is_told_by_names_and_shapes(family: str, layout: str) -> None:
    shapes = FAMILIES[family]
    if layout == "diffusers":
        shapes = {official_to_diffusers(name): shape for name, shape in shapes.items()}
    file = inspect_transformer(Header(shapes))
    assert (file.family, file.layout) == (family, layout)


def test_the_header_says_sizes_dtypes_and_scales() -> None:
    shapes: Shapes = {f"model.diffusion_model.{name}": shape for name, shape in T2V_14B.items()}
    file = inspect_transformer(Header(shapes | {"model.diffusion_model.blocks.0.ffn.0.scale_weight": ()}))
    assert file.sizes == TASKS["t2v-14B"].sizes
    assert file.prefix == "model.diffusion_model."
    assert file.dtypes == (torch.bfloat16,)
    assert file.scales == {"blocks.0.ffn.0.weight": "model.diffusion_model.blocks.0.ffn.0.scale_weight"}
    assert file.scaled and not inspect_transformer(Header(shapes)).scaled


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "t2v"])
def test_another_family_is_refused_with_what_it_is_what_was_asked_and_what_to_pass(family: str) -> None:
    file = inspect_transformer(Header(FAMILIES[family], "models/other.safetensors"))
    with pytest.raises(CheckpointError) as error:
        check_task(file, "t2v-14B")
    message = str(error.value)
    assert message.startswith(str(Path("models/other.safetensors")))
    assert "--task t2v-14B trains Wan2.1-T2V-14B" in message
    assert "wan2.1_t2v_14B_bf16.safetensors" in message


def test_a_family_with_a_task_of_its_own_is_told_that_it_is_not_supported_yet() -> None:
    with pytest.raises(CheckpointError, match=r"image conditioning.*not supported yet"):
        check_task(inspect_transformer(Header(FAMILIES["i2v"])), "t2v-14B")


@pytest.mark.parametrize(("task", "own"), [("t2v-14B", "t2v-1.3B"), ("t2v-1.3B", "t2v-14B")])
def test_the_released_size_of_another_task_is_refused_with_that_task(task: str, own: str) -> None:
    file = inspect_transformer(Header(t2v(TASKS[own].sizes)))
    with pytest.raises(CheckpointError, match=f"is {TASKS[own].title}, but .*use --task {own}"):
        check_task(file, task)


@pytest.mark.parametrize("task", ["t2v-14B", "t2i-14B"])
def test_the_14b_file_serves_clips_and_pictures(task: str) -> None:
    check_task(inspect_transformer(Header(T2V_14B)), task)


def test_a_size_never_released_is_announced_once_and_accepted(caplog: pytest.LogCaptureFixture) -> None:
    tiny = WanSizes(dim=128, ffn_dim=64, num_layers=2, text_dim=32)
    file = inspect_transformer(Header(t2v(tiny), "announced/tiny.safetensors"))
    with caplog.at_level(logging.INFO, logger="wanlora"):
        logging.getLogger("wanlora").addHandler(caplog.handler)
        check_task(file, "t2v-14B")
        check_task(file, "t2v-14B")
        logging.getLogger("wanlora").removeHandler(caplog.handler)
    said = {record.getMessage() for record in caplog.records}
    assert len(said) == 1
    assert "2 blocks of width 128" in said.pop()


def test_an_expert_of_2_2_is_told_by_its_name_only(caplog: pytest.LogCaptureFixture) -> None:
    file = inspect_transformer(Header(T2V_14B, "high_noise_model/diffusion_pytorch_model.safetensors"))
    with caplog.at_level(logging.WARNING, logger="wanlora"):
        logging.getLogger("wanlora").addHandler(caplog.handler)
        check_task(file, "t2v-14B")
        logging.getLogger("wanlora").removeHandler(caplog.handler)
    assert "--min_timestep" in caplog.text


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (list(GOLDEN["vae21"]), "--vae"),
        (list(GOLDEN["umt5"]), "--t5"),
        (list(GOLDEN["clip"]), "CLIP"),
        (["lora_unet_blocks_0_ffn_0.lora_down.weight"], "LoRA"),
        (["diffusion_model.blocks.0.ffn.0.lora_A.weight"], "LoRA"),
        (["something.weight", "else.weight"], "something.weight"),
    ],
)
def test_other_files_are_named(names: list[str], says: str) -> None:
    with pytest.raises(CheckpointError, match=r"--dit wants a whole Wan transformer") as error:
        inspect_transformer(Header(dict.fromkeys(names, (1,)), "models/wrong.safetensors"))
    assert says in str(error.value)
    assert str(Path("models/wrong.safetensors")) in str(error.value)


def test_half_a_model_is_refused() -> None:
    half = {name: shape for name, shape in T2V_14B.items() if not name.startswith("blocks.0.")}
    with pytest.raises(CheckpointError, match=r"file.safetensors: .*blocks.0.ffn.0.weight.*all shards"):
        inspect_transformer(Header(half))


def test_a_width_that_no_head_divides_is_refused() -> None:
    odd = t2v(WanSizes(dim=96, ffn_dim=64, num_layers=1, text_dim=32, head_dim=32))
    with pytest.raises(CheckpointError, match="width of 96"):
        inspect_transformer(Header(odd))


def test_formats_below_8_bits_are_refused_by_name() -> None:
    with pytest.raises(CheckpointError, match=r"int4_like.weight is stored as uint8.*bf16"):
        inspect_transformer(Header({**T2V_14B, "blocks.0.int4_like.weight": (1,)}))


@pytest.mark.parametrize("shape", [(3,), (5120, 7), (7, 1), (5120, 80, 2), (2, 2, 2, 2)])
def test_a_scale_that_does_not_fit_is_refused_before_anything_is_read(shape: tuple[int, ...]) -> None:
    shapes = {**T2V_14B, "blocks.0.self_attn.q.scale_weight": shape}
    with pytest.raises(CheckpointError, match=r"blocks.0.self_attn.q.weight cannot be scaled"):
        inspect_transformer(Header(shapes))


@pytest.mark.parametrize("task", sorted(FUTURE_TASKS))
def test_a_task_known_from_musubi_is_explained(task: str) -> None:
    with pytest.raises(ConfigError, match="not supported yet"):
        task_spec(task)


def test_an_unknown_task_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 't2v-14B'"):
        task_spec("t2v_14B")
