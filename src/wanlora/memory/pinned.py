"""Page-locked host memory, to the byte.

Only page-locked memory is copied to the card beside the computation and at full speed (55 against 11 GB/s where we
measured). The allocator's own pinned memory rounds every request up to a power of two, which would cost a 14B model's
fp8 blocks (0.35 GB each) half as much again; ordinary memory registered with the driver costs what it holds. The
system may refuse (Windows locks at most half of the memory): then the memory serves as it is and the user is told
once.
"""

import contextlib

import torch
from torch import Tensor

from wanlora.foundation.log import warn_once

_PORTABLE = 1
_registered: dict[int, Tensor] = {}
"""Keeps registered memory alive until `unpin`: memory must not be freed while the driver holds it."""


def pinned_buffer(num_bytes: int, *, device: torch.device, pin: bool = True) -> Tensor:
    """Uninitialised host memory [num_bytes] uint8, page-locked if `pin` and `device` is a CUDA device."""
    buffer = torch.empty(num_bytes, dtype=torch.uint8)
    if pin and num_bytes and device.type == "cuda" and not _register(buffer, device):
        warn_once(
            f"the system refused to page-lock {num_bytes / 2**20:.0f} MiB of memory: copies to the card are several "
            "times slower and computation waits for them; close other programs or stream fewer blocks"
        )
    return buffer


def unpin(buffer: Tensor) -> None:
    """Return page-locked memory to the ordinary kind; does nothing to other memory. No copy of it may be under way."""
    if _registered.pop(buffer.data_ptr(), None) is not None:
        torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())


def is_page_locked(buffer: Tensor) -> bool:
    """Whether `pinned_buffer` locked this memory."""
    return buffer.data_ptr() in _registered


def _register(buffer: Tensor, device: torch.device) -> bool:
    torch.cuda.current_stream(device)  # starts CUDA, if nothing has yet
    if int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.numel(), _PORTABLE)) != 0:
        _forget_refusal(device)
        return False
    _registered[buffer.data_ptr()] = buffer
    return True


def _forget_refusal(device: torch.device) -> None:
    """Take the refusal out of the driver's last-error slot, where the next kernel would find it and be blamed."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device=device)
