"""Copies between host and device that run beside the computation.

A copy is queued on a stream of its own; what it must wait for and who waits for it is said with marks (events), so
the host never stops. On a device without streams the same calls copy at once, which makes everything that is built on
them testable anywhere.
"""

from typing import Protocol

import torch
from torch import Tensor

Mark = torch.cuda.Event | None
"""A point in a device's queue; None where copies are immediate."""


class Transfers(Protocol):
    """A queue of copies."""

    def copy(self, target: Tensor, source: Tensor, *, after: Mark = None) -> Mark:
        """Queue a copy that starts once `after` is reached; the mark returned is reached when it is done."""

    def wait(self, mark: Mark) -> None:
        """Let computation that is queued from now on wait for `mark`."""

    def mark(self) -> Mark:
        """The point that computation has been queued up to."""

    def finish(self) -> None:
        """Stop the host until every copy is done. For taking things down, never for a training step."""


class DirectTransfers:
    """Copies that are done when the call returns."""

    def copy(self, target: Tensor, source: Tensor, *, after: Mark = None) -> Mark:
        target.copy_(source)
        return None

    def wait(self, mark: Mark) -> None:
        pass

    def mark(self) -> Mark:
        return None

    def finish(self) -> None:
        pass


class CudaTransfers:
    """Copies on a side stream of one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def copy(self, target: Tensor, source: Tensor, *, after: Mark = None) -> Mark:
        with torch.cuda.stream(self.stream):
            if after is not None:
                self.stream.wait_event(after)
            target.copy_(source, non_blocking=True)
            return self.stream.record_event()

    def wait(self, mark: Mark) -> None:
        if mark is not None:
            torch.cuda.current_stream(self.device).wait_event(mark)

    def mark(self) -> Mark:
        return torch.cuda.current_stream(self.device).record_event()

    def finish(self) -> None:
        self.stream.synchronize()


def transfers_for(device: torch.device) -> Transfers:
    """Side-stream copies on CUDA, immediate ones elsewhere."""
    return CudaTransfers(device) if device.type == "cuda" else DirectTransfers()
