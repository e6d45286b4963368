"""NVIDIA's driver, woken while something else is done.

Before the first use of a card the driver looks for cards, then makes a context on the one that is used. Either may take
a second. PyTorch has both done when first asked for something and keeps all Python waiting; called from here, in a
thread, the driver keeps nobody waiting. What cannot be done here is left to PyTorch, which says what is wrong.
"""

import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from wanlora.foundation.laps import start

_SETTINGS = {"CUDA_MODULE_LOADING": "LAZY", "CUDA_SCALE_LAUNCH_QUEUES": "4x"}
"""What the driver reads once: modules are loaded when they are used, as PyTorch has it, and four times as many kernels
as usual can be queued. A host that is slower than the card in small batches gets ahead of it in large ones by that."""
_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"


@contextmanager
def finding_cards(*, wanted: bool = True) -> Iterator[None]:
    """Let the driver look for cards meanwhile; it has when the block is left. Nothing is put on a card."""
    with _meanwhile(_find_cards, wanted):
        yield


@contextmanager
def starting_card(index: int | None) -> Iterator[None]:
    """Let the driver make its context on a card meanwhile, about 0.5 GB there; None for no card."""
    with _meanwhile(lambda: _make_context(index or 0), index is not None):
        yield


@contextmanager
def _meanwhile(work: Callable[[], object], wanted: bool) -> Iterator[None]:
    thread = threading.Thread(target=work, daemon=True)
    if wanted:
        for name, value in _SETTINGS.items():
            os.environ.setdefault(name, value)
        thread.start()
    try:
        yield
    finally:
        if wanted:
            with start.part("card"):
                thread.join()


def _find_cards() -> Any:
    """The driver's library, its cards found; None without one."""
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(_LIBRARY)
        if library.cuInit(0) == 0:
            return library
    return None


def _make_context(index: int) -> bool:
    """Whether the context of the card is there now: its primary one, which is PyTorch's too."""
    library = _find_cards()
    card, context = ctypes.c_int(), ctypes.c_void_p()
    if library is None or library.cuDeviceGet(ctypes.byref(card), index) != 0:
        return False
    made: int = library.cuDevicePrimaryCtxRetain(ctypes.byref(context), card)
    return made == 0
