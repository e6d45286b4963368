"""What takes long and needs nobody, done while the program waits for something else."""

import gc
import importlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress


@contextmanager
def meanwhile(work: Callable[[], object]) -> Iterator[None]:
    """Let a thread do `work`; it is done afterwards. An error of the caller, or Ctrl-C, waits for nothing.

    An error of the work is dropped: what it was for does without, or says what is wrong.
    """
    thread = threading.Thread(target=_quietly, args=(work,), daemon=True)
    thread.start()
    yield
    thread.join()


@contextmanager
def importing(module: str) -> Iterator[None]:
    """Import `module` meanwhile. Two threads must not import at once, or one sees modules half made."""
    with meanwhile(lambda: _import(module)):
        yield


def _quietly(work: Callable[[], object]) -> None:
    with suppress(Exception):
        work()


def _import(module: str) -> None:
    gc.disable()  # of the objects that are made hardly any are garbage, and looking for it takes a fifth of the time
    try:
        importlib.import_module(module)
    finally:
        gc.enable()
