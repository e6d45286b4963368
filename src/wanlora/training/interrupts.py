"""Ctrl-C, let through only where the weights and the position in the data agree.

An update changes the weights tensor by tensor, and the position moves after it. Stopped in between, a run would save
weights of a step that it counts as not done. So Ctrl-C waits for the end of that short stretch; everywhere else it acts
at once. Of several processes each gets Ctrl-C at another moment: there it waits until all have finished the step, so
that none waits for one that is gone. While a stopped run is being saved, Ctrl-C changes nothing: who presses it twice
must not lose what the first one saves. A polite request to end (SIGTERM: a shutdown, a container that is stopped) is
the same as Ctrl-C.

Python drops what is raised in some places (hooks of a fork, while workers of the loader start; destructors). Ctrl-C
that is lost there acts at the end of the next step.
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

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Use as a context manager around the loop; does nothing outside the main thread, where no signal arrives."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.wanted = False
        """Ctrl-C was pressed, and may not have acted yet."""
        self._held = False
        self._ignored = False
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, former in self._former.items():
            signal.signal(number, former)
        self._former = {}

    @contextmanager
    def held(self) -> Iterator[None]:
        """Ctrl-C inside the block acts at its end, unless an error ends it."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        self._act_if(self.wanted and self.engine.rank.count == 1)

    @contextmanager
    def ignored(self) -> Iterator[None]:
        """Ctrl-C inside the block is answered and changes nothing."""
        self._ignored = True
        try:
            yield
        finally:
            self._ignored = False

    def agree(self) -> None:
        """Raise `KeyboardInterrupt` if any of several processes has been interrupted; all call this after a step."""
        if self.engine.rank.count > 1:
            votes = self.engine.sum(torch.tensor(float(self.wanted), device=self.engine.device))
            self._act_if(votes.item() > 0)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._ignored:
            log.info("Ctrl-C: the run is stopping, what was trained is being saved")
        elif self._held or self.engine.rank.count > 1:
            if not self.wanted:
                log.info("Ctrl-C: stopping after this step")
            self.wanted = True
        else:
            self.wanted = True
            raise KeyboardInterrupt

    def _act_if(self, now: bool) -> None:
        if now:
            self.wanted = False
            raise KeyboardInterrupt
