"""What was released: one frozen row per Wan variant, and the sizes of a transformer.

A file's graph is decided by its tensors (`WanSizes.from_shapes`), its defaults for sampling by the task the user names
(`TASKS`). Adding a variant is adding a row. Figures: the official Wan2.1 configurations.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from wanlora.foundation.errors import CheckpointError, ConfigError, did_you_mean
from wanlora.foundation.shapes import PATCH

_BLOCK = re.compile(r"^blocks\.(\d+)\.")


@dataclass(frozen=True, kw_only=True, slots=True)
class WanSizes:
    """The numbers that fix a transformer's graph."""

    dim: int
    """Width of the residual stream."""
    ffn_dim: int
    """Width inside the feed-forward network."""
    num_layers: int
    """Blocks."""
    in_channels: int = 16
    """Latent channels that enter, conditioning included."""
    out_channels: int = 16
    """Latent channels of the predicted velocity."""
    text_dim: int = 4096
    """Width of the text embeddings."""
    freq_dim: int = 256
    """Length of the sinusoid that encodes the timestep."""
    head_dim: int = 128
    """Width of one attention head."""
    text_len: int = 512
    """Rows that every text is padded to."""
    eps: float = 1e-6
    """Added to the variance by every norm."""

    def __post_init__(self) -> None:
        if self.dim % self.head_dim:
            raise CheckpointError(
                f"a width of {self.dim} cannot be split into heads of {self.head_dim}; this is no Wan transformer"
            )

    @property
    def num_heads(self) -> int:
        """Attention heads."""
        return self.dim // self.head_dim

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple[int, ...]]) -> "WanSizes":
        """Read the sizes off a whole set of tensors with official names.

        Raises `CheckpointError` if one of the tensors that tell is missing or no block is there.
        """
        blocks = [int(match[1]) for name in shapes if (match := _BLOCK.match(name))]
        try:
            return cls(
                dim=shapes["head.modulation"][-1],
                ffn_dim=shapes["blocks.0.ffn.0.weight"][0],
                num_layers=max(blocks, default=-1) + 1,
                in_channels=shapes["patch_embedding.weight"][1],
                out_channels=shapes["head.head.weight"][0] // PATCH**2,
                text_dim=shapes["text_embedding.0.weight"][1],
                freq_dim=shapes["time_embedding.0.weight"][1],
            )
        except KeyError as error:
            raise CheckpointError(
                f"a Wan transformer has a tensor {error}, this file has none: it holds only part of the model; "
                "fetch the whole file, or all shards"
            ) from error


@dataclass(frozen=True, kw_only=True, slots=True)
class WanSpec:
    """A released variant: its graph and the values its authors sample with."""

    name: str
    """What the user types after --task."""
    title: str
    """What the release is called."""
    file: str
    """What its file is usually called."""
    family: str
    """Kind of graph, a key of `detect.FAMILIES`."""
    sizes: WanSizes
    """Sizes of the released file."""
    image_branch: bool = False
    """Whether cross attention also sees image tokens."""
    steps: int = 50
    """Sampling steps."""
    shift: float = 5.0
    """Shift of the sampling grid towards noise."""
    guidance: float = 5.0
    """Weight of classifier-free guidance."""
    frames: int = 81
    """Frames of a clip."""
    fps: int = 16
    """Frames per second."""
    resolutions: tuple[tuple[int, int], ...]
    """Sizes it was trained for, as (width, height)."""


_SIZES_1_3B = WanSizes(dim=1536, ffn_dim=8960, num_layers=30)
_SIZES_14B = WanSizes(dim=5120, ffn_dim=13824, num_layers=40)
_RESOLUTIONS_480P = ((832, 480), (480, 832))
_RESOLUTIONS_720P = ((1280, 720), (720, 1280))

_ROWS = (
    WanSpec(
        name="t2v-1.3B",
        title="Wan2.1-T2V-1.3B",
        file="wan2.1_t2v_1.3B_bf16.safetensors",
        family="t2v",
        sizes=_SIZES_1_3B,
        resolutions=_RESOLUTIONS_480P,
    ),
    WanSpec(
        name="t2v-14B",
        title="Wan2.1-T2V-14B",
        file="wan2.1_t2v_14B_bf16.safetensors",
        family="t2v",
        sizes=_SIZES_14B,
        resolutions=_RESOLUTIONS_720P + _RESOLUTIONS_480P,
    ),
    WanSpec(
        name="t2i-14B",
        title="Wan2.1-T2V-14B",
        file="wan2.1_t2v_14B_bf16.safetensors",
        family="t2v",
        sizes=_SIZES_14B,
        frames=1,
        resolutions=((1024, 1024), *_RESOLUTIONS_720P, *_RESOLUTIONS_480P),
    ),
)
TASKS: dict[str, WanSpec] = {row.name: row for row in _ROWS}
"""Every task that can be trained, by the name typed after --task."""

FUTURE_TASKS: dict[str, str] = {
    "i2v-14B": "Wan2.1 image to video needs image conditioning (CLIP and a first frame), which is not supported yet",
    "flf2v-14B": "Wan2.1 first and last frame to video needs image conditioning, which is not supported yet",
    "t2v-1.3B-FC": "Wan2.1 Fun-Control needs a control video beside each clip, which is not supported yet",
    "t2v-14B-FC": "Wan2.1 Fun-Control needs a control video beside each clip, which is not supported yet",
    "i2v-14B-FC": "Wan2.1 Fun-Control needs a control video and image conditioning, which are not supported yet",
    "t2v-A14B": "Wan2.2 text to video trains two experts with a boundary between them, which is not supported yet",
    "i2v-A14B": "Wan2.2 image to video trains two experts with image conditioning, which is not supported yet",
}
"""Tasks that users know from musubi and that cannot be trained here yet: the sentence to answer with."""


def task_spec(task: str) -> WanSpec:
    """The row of a task. Raises `ConfigError` that explains a task known from musubi, or names the nearest."""
    if task in TASKS:
        return TASKS[task]
    known = ", ".join(TASKS)
    if task in FUTURE_TASKS:
        raise ConfigError(f"--task {task}: {FUTURE_TASKS[task]}; tasks that can be trained: {known}")
    raise ConfigError(f"unknown task {task!r}{did_you_mean(task, TASKS)}; tasks that can be trained: {known}")
