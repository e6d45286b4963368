"""How much of a card this process may take.

What is taken beyond the card's own memory is an error on Linux, which can be handled. On Windows, and in WSL, the
driver may move memory of the card to the system instead: nothing fails and everything takes many times as long, often
for the rest of the run. So the allocator is held below what is free: then it raises the error everywhere. Other
programs (a desktop, a browser) take memory of the card too and may take more later; `reserve` is left to them. What
libraries take past the allocator after the limit is set comes out of the reserve too.
"""

import os
import platform
import sys
from dataclasses import dataclass

import torch

from wanlora.foundation.errors import MemoryPlanError
from wanlora.foundation.log import log, say_once
from wanlora.memory.measure import GIB

_RESERVE_GIB, _RESERVE_WHERE_DRIVERS_SPILL_GIB = 0.5, 1.0
_FRAGMENTS, _FRAGMENTS_IN_FIXED_SEGMENTS = 0.02, 0.06
"""The part of the memory that is likely lost between tensors."""
_ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


@dataclass(frozen=True, kw_only=True, slots=True)
class CardLimit:
    """What may be used of a card, in bytes."""

    total: int
    """What the card has."""
    others: int
    """In use by other programs and by CUDA when this was measured."""
    reserve: int
    """Left free."""
    at_most: int | None = None
    """The user's own limit."""
    expandable: bool = False
    """The allocator's segments grow, so little is lost to fragments."""
    adjustable: bool = True
    """The user has flags for the reserve and the limit."""

    @property
    def reserved(self) -> int:
        """What the allocator may take from the driver."""
        free = self.total - self.others - self.reserve
        return max(free if self.at_most is None else min(free, self.at_most), 0)

    @property
    def allocated(self) -> int:
        """What tensors can be expected to hold of that."""
        lost = _FRAGMENTS if self.expandable else _FRAGMENTS_IN_FIXED_SEGMENTS
        return int((1 - lost) * self.reserved)

    def __str__(self) -> str:
        flags = "" if self.at_most is None else f"--vram_limit {self.at_most / GIB:g}, "
        reserve = f"{self.reserve / GIB:g}"
        flags += f"--vram_reserve {reserve}" if self.adjustable else f"{reserve} left free"
        segments = ", expandable segments" if self.expandable else ""
        return (
            f"{self.total / GIB:.1f} GiB on the card, {self.others / GIB:.1f} in use already; this run takes at most "
            f"{self.reserved / GIB:.1f} ({flags}{segments})"
        )


def driver_spills() -> bool:
    """Whether the driver of this system may move memory of the card to the system (Windows, and Linux in it)."""
    return sys.platform == "win32" or "microsoft" in platform.uname().release.lower()


def default_reserve() -> float:
    """GiB that are left free unless the user says otherwise."""
    return _RESERVE_WHERE_DRIVERS_SPILL_GIB if driver_spills() else _RESERVE_GIB


def limit_card(
    device: torch.device, *, reserve: float | None, at_most: float | None, adjustable: bool = True
) -> CardLimit | None:
    """Hold the allocator below what is free now, less `reserve` GiB, and below `at_most` GiB; None without a card.

    To be called before anything is on the card. `adjustable` says whether the user has flags for both. Raises
    `MemoryPlanError` if nothing is left.
    """
    if device.type != "cuda":
        return None
    expandable = _expand_segments()
    card = torch.cuda.current_device() if device.index is None else device.index
    free, total = torch.cuda.mem_get_info(card)  # starts CUDA, whose own memory counts as used
    limit = CardLimit(
        total=total,
        others=total - free - torch.cuda.memory_reserved(card),
        reserve=int((default_reserve() if reserve is None else reserve) * GIB),
        at_most=None if at_most is None else int(at_most * GIB),
        expandable=expandable,
        adjustable=adjustable,
    )
    if limit.reserved == 0:
        raise MemoryPlanError(
            f"nothing is left of the card's memory: {limit}. Close what else uses it (nvidia-smi names it)"
            + (", or lower --vram_reserve" if adjustable else "")
        )
    torch.cuda.set_per_process_memory_fraction(min(limit.reserved / total, 1.0), card)
    log.info(str(limit))
    return limit


def free_for_tensors(device: torch.device) -> int | None:
    """Bytes that tensors can be expected to get still, within what `limit_card` has set; None without a card.

    What is lost to fragments depends on the past, so the larger part is assumed.
    """
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    reachable = free + torch.cuda.memory_reserved(device)
    allowed = int(total * torch.cuda.get_per_process_memory_fraction(device))
    return int(
        (1 - _FRAGMENTS_IN_FIXED_SEGMENTS) * max(0, min(reachable, allowed) - torch.cuda.memory_allocated(device))
    )


def _expand_segments() -> bool:
    """Let the allocator's segments grow, where that works and the user has not set the allocator up; whether they do.

    Sizes of a shuffled epoch leave gaps in segments of fixed size, up to several GiB.
    """
    given = [f"{name}={os.environ[name]}" for name in _ALLOCATOR_VARIABLES if name in os.environ]
    if given:
        say_once(f"the allocator is set up by {given[0]}")
        return "expandable_segments:true" in given[0].lower()
    if driver_spills():
        return False
    configure = getattr(torch._C, "_accelerator_setAllocatorSettings", None)  # before 2.10 it had another name
    try:
        (configure or torch.cuda.memory._set_allocator_settings)("expandable_segments:True")
    except (AttributeError, RuntimeError) as error:
        say_once(f"this version of PyTorch cannot expand the allocator's segments: {error}")
        return False
    return True
