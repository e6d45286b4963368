"""Ctrl-C, let through only where the weights and the position in the data agree.

An update changes the weights tensor by tensor, and the position moves after it. Stopped in between, a run would save
weights of a step that it counts as not done. So Ctrl-C waits for the end of that short stretch; everywhere else it acts
at once. Of several processes each gets Ctrl-C at another moment: there it waits until all have finished the step, so
that none waits for one that is gone.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch

from wanlora.foundation.log import log
from wanlora.training.engine import Engine


class Interrupts:
    """Use as a context manager around the loop; does nothing outside the main thread, where no signal arrives."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.wanted = False
        """Ctrl-C was pressed and has not acted yet."""
        self._held = False
        self._former: Any = None

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            self._former = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *error: object) -> None:
        if self._former is not None:
            signal.signal(signal.SIGINT, self._former)
            self._former = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Ctrl-C inside the block acts at its end, unless an error ends it."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        self._act_if(self.wanted and self.engine.rank.count == 1)

    def agree(self) -> None:
        """Raise `KeyboardInterrupt` if any of several processes has been interrupted; all call this after a step."""
        if self.engine.rank.count > 1:
            votes = self.engine.sum(torch.tensor(float(self.wanted), device=self.engine.device))
            self._act_if(votes.item() > 0)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._held or self.engine.rank.count > 1:
            if not self.wanted:
                log.info("Ctrl-C: stopping after this step")
            self.wanted = True
        else:
            raise KeyboardInterrupt

    def _act_if(self, now: bool) -> None:
        if now:
            self.wanted = False
            raise KeyboardInterrupt
