"""Moments on the line of work of a device, and the seconds between them.

A card works through what the host has queued, so a moment on the host says nothing about the work. A mark is queued
like the work itself and is passed when the work before it is done.
"""

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch


class Marks(Protocol):
    """Sets marks and reads them."""

    def mark(self) -> Any:
        """This moment in the device's work."""

    def seconds(self, began: Any, ended: Any) -> float:
        """The device's time between two marks. Waits until the second is passed."""


class HostMarks:
    """Of a device that computes when it is called: the host's own clock, in seconds."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock

    def mark(self) -> float:
        return self.clock()

    def seconds(self, began: float, ended: float) -> float:
        return ended - began


class CardMarks:
    """Of the current stream of a card."""

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, began: torch.cuda.Event, ended: torch.cuda.Event) -> float:
        ended.synchronize()
        return began.elapsed_time(ended) / 1000


def marks_for(device: torch.device) -> Marks:
    """A card's marks on CUDA, the host's clock elsewhere."""
    return CardMarks() if device.type == "cuda" else HostMarks()
