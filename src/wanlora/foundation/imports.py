"""Imports that take long, done while the program waits for something else."""

import gc
import importlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def importing(module: str) -> Iterator[None]:
    """Import `module` in a thread meanwhile; it is there afterwards.

    An error of the import shows where the module is used. An error of the caller, or Ctrl-C, waits for nothing.
    """
    thread = threading.Thread(target=_import, args=(module,), daemon=True)
    thread.start()
    yield
    thread.join()  # modules that two threads import at once may be seen half made


def _import(module: str) -> None:
    gc.disable()  # of the objects that are made hardly any are garbage, and looking for it takes a fifth of the time
    try:
        with suppress(Exception):
            importlib.import_module(module)
    finally:
        gc.enable()
