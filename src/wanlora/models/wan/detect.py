"""Which member of the Wan family a transformer is, and whether it is the one that a task trains.

Names and shapes tell the families apart. They cannot tell a Wan2.2 T2V-A14B expert from the Wan2.1 T2V-14B model (all
1095 shapes agree), nor one expert from the other; there only the file's name says something.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from wanlora.foundation.errors import CheckpointError
from wanlora.foundation.log import say_once, warn_once
from wanlora.models.wan.spec import FUTURE_TASKS, TASKS, WanSizes, task_spec

FAMILIES: dict[str, str] = {
    "t2v": "a Wan text to video transformer",
    "i2v": "a Wan2.1 image to video transformer (I2V-14B or Fun-InP)",
    "flf2v": "a Wan2.1 first and last frame to video transformer (FLF2V-14B)",
    "fun-control": "a Wan2.1 Fun-Control transformer",
    "fun-camera": "a Wan Fun-Control-Camera transformer",
    "fun-control-A14B": "an expert of Wan2.2 Fun-A14B-Control",
    "i2v-A14B": "an expert of Wan2.2 I2V-A14B (or Fun-A14B-InP)",
    "ti2v-5B": "the Wan2.2 TI2V-5B transformer",
    "vace": "a Wan VACE transformer",
    "animate": "a Wan Animate transformer",
    "s2v": "a Wan S2V transformer",
    "unknown": "a Wan transformer of a kind that is not known here",
}
"""Every kind of graph that is recognised, and what to call it."""

_TASK_OF_FAMILY = {"i2v": "i2v-14B", "flf2v": "flf2v-14B", "fun-control": "t2v-14B-FC", "i2v-A14B": "i2v-A14B"}

_EXPERT = re.compile(r"(high|low)[_-]?noise|wan_?2[._]2|a14b", re.IGNORECASE)


def family_of(shapes: Mapping[str, tuple[int, ...]], sizes: WanSizes) -> str:
    """The key of `FAMILIES` for tensors with official names."""
    for mark, family in (
        ("vace_", "vace"),
        ("motion_encoder.", "animate"),
        ("face_adapter.", "animate"),
        ("casual_audio_encoder.", "s2v"),
        ("control_adapter.", "fun-camera"),
        ("img_emb.emb_pos", "flf2v"),
    ):
        if any(name.startswith(mark) for name in shapes):
            return family
    if sizes.out_channels == 48:
        return "ti2v-5B"
    with_image = {36: "i2v", 48: "fun-control", 32: "fun-camera"}
    without = {16: "t2v", 36: "i2v-A14B", 52: "fun-control-A14B"}
    return (with_image if "img_emb.proj.0.weight" in shapes else without).get(sizes.in_channels, "unknown")


def check_fits_task(path: Path, family: str, sizes: WanSizes, task: str) -> None:
    """Raise `CheckpointError` if a file of this family and size is not what `task` trains.

    A size that was never released is said once and accepted.
    """
    spec = task_spec(task)
    if family != spec.family:
        raise CheckpointError(_wrong_family(path, family, task))
    if sizes != spec.sizes:
        _check_size(path, sizes, task)
    if _EXPERT.search(f"{path.parent.name}/{path.name}"):
        warn_once(
            f"{path}: by its name this is an expert of Wan2.2, by its tensors it cannot be told; it is trained as "
            f"{spec.title} over all timesteps unless --min_timestep and --max_timestep keep it to its part "
            "(T2V: high noise 875 to 1000, low noise 0 to 875)"
        )


def _wrong_family(path: Path, family: str, task: str) -> str:
    spec = task_spec(task)
    message = f"{path} is {FAMILIES[family]}, but --task {task} trains {spec.title}: pass that, usually {spec.file}"
    own_task = _TASK_OF_FAMILY.get(family)
    return f"{message}. ({FUTURE_TASKS[own_task]}.)" if own_task else message


def _check_size(path: Path, sizes: WanSizes, task: str) -> None:
    spec = task_spec(task)
    for other in TASKS.values():
        if sizes == other.sizes:
            raise CheckpointError(
                f"{path} is {other.title}, but --task {task} trains {spec.title}: "
                f"use --task {other.name}, or pass {spec.file}"
            )
    say_once(
        f"{path}: {sizes.num_layers} blocks of width {sizes.dim} (feed-forward {sizes.ffn_dim}), a size that was never "
        f"released; trained as {task}"
    )
