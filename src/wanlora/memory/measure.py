"""What the card's memory holds, and what to change when it does not suffice."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

GIB = 2**30
_NOTABLE_SLACK_GIB = 1.0
_MORE_BLOCKS = 10
_SHOWN_CLIPS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryFigures:
    """The allocator's figures, GiB."""

    allocated: float
    """Held by tensors now."""
    reserved: float
    """Taken from the driver now."""
    peak: float
    """Most that tensors held since `reset_peak`."""
    total: float
    """What the card has."""

    @property
    def slack(self) -> float:
        """Reserved but in no tensor: lost to fragments if it cannot be used."""
        return self.reserved - self.allocated


def memory_figures(device: torch.device) -> MemoryFigures:
    """Figures of a CUDA device; zeros for others, which have no allocator to ask."""
    if device.type != "cuda":
        return MemoryFigures(allocated=0.0, reserved=0.0, peak=0.0, total=0.0)
    return MemoryFigures(
        allocated=torch.cuda.memory_allocated(device) / GIB,
        reserved=torch.cuda.memory_reserved(device) / GIB,
        peak=torch.cuda.max_memory_allocated(device) / GIB,
        total=torch.cuda.get_device_properties(device).total_memory / GIB,
    )


class Meter(Protocol):
    """What an allocator can be asked, in bytes."""

    def allocated(self) -> int:
        """Held by tensors now."""

    def peak(self) -> int:
        """Most that tensors held since `reset`."""

    def reset(self) -> None:
        """Begin a new measurement of `peak`."""

    def take_highest(self) -> int:
        """Most that tensors held since the last call, whoever called `reset` in between."""

    def retries(self) -> int:
        """How often, since the start, the allocator had to return memory to the driver to take other memory."""

    def free(self) -> int:
        """What no program has taken of the card."""


class CudaMeter:
    """The allocator of a card. Reading it does not wait for the card: memory is handed out by the host."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._highest = 0

    def allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device)

    def reset(self) -> None:
        self._highest = max(self._highest, self.peak())
        torch.cuda.reset_peak_memory_stats(self.device)

    def take_highest(self) -> int:
        self.reset()
        highest, self._highest = self._highest, 0
        return highest

    def retries(self) -> int:
        return int(torch.cuda.memory_stats(self.device).get("num_alloc_retries", 0))

    def free(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class MemorySettings:
    """What a run already does about memory."""

    gradient_checkpointing: bool
    """Blocks are recomputed."""
    offload: bool
    """Their inputs are kept on the host."""
    fp8: bool
    """Block weights are in eight bits."""
    blocks_to_swap: int
    """Blocks that are streamed."""
    num_blocks: int
    """Blocks of the model."""
    num_kept: int = 0
    """Blocks that were not recomputed when memory ran out."""
    attention_kept: int = 0
    """Of the others, those that kept the result of attention."""
    retried: bool = False
    """Everything that can be changed while running was changed before."""
    transposed: bool = False
    """The weights were there transposed as well."""
    limited: bool = False
    """The run may not take all that is free."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch, CUDA or cuBLAS means that memory ran out."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("out of memory" in text or "STATUS_ALLOC_FAILED" in text)


def explain_out_of_memory(
    figures: MemoryFigures, settings: MemorySettings, *, bucket: str, clips: Sequence[str] = ()
) -> str:
    """The text of a `MemoryPlanError`: what did not fit, the figures, and which settings to change, cheapest first."""
    shown = ", ".join(clips[:_SHOWN_CLIPS]) + (f" and {len(clips) - _SHOWN_CLIPS} more" if clips[_SHOWN_CLIPS:] else "")
    where = f"{bucket} ({shown})" if clips else bucket
    lines = [
        f"the card's memory does not suffice for {where}: peak {figures.peak:.1f} of {figures.total:.1f} GiB, "
        f"{figures.slack:.1f} GiB reserved but in no tensor, {settings.num_kept} blocks not recomputed. What helps, "
        "the cheapest first:"
    ]
    return "\n  - ".join([*lines, *_cures(figures, settings)])


def _cures(figures: MemoryFigures, settings: MemorySettings) -> list[str]:
    cures = []
    if figures.slack > _NOTABLE_SLACK_GIB:
        cures.append("PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True in the environment (Linux; fewer fragments)")
    if settings.limited:
        cures.append("a higher --vram_limit, or none")
    if settings.transposed:
        cures.append("--fp8_fast_transposed off (no second copy of the weights)")
    if not settings.gradient_checkpointing:
        cures.append("--gradient_checkpointing")
    elif settings.num_kept or settings.attention_kept:
        cures.append("--activation_memory off (every block is recomputed), or a number of GiB that is lower")
    if not settings.retried:
        cures.append("--on_oom retry (makes room and goes on)")
    if not settings.fp8:
        cures.append("--fp8_base --fp8_scaled (halves the weights)")
    if settings.blocks_to_swap < settings.num_blocks:
        more = min(settings.blocks_to_swap + _MORE_BLOCKS, settings.num_blocks)
        cures.append(f"--blocks_to_swap {more} instead of {settings.blocks_to_swap}")
    if settings.gradient_checkpointing and not settings.offload:
        cures.append("--gradient_checkpointing_cpu_offload")
    cures.append("fewer target_frames, a smaller resolution or a smaller batch_size for this dataset")
    return cures
