"""Kernels of ours, which serve only where they are found to do what they should."""

from collections.abc import Callable
from typing import TypeVar

from wanlora.foundation.log import say_once

Kernels = TypeVar("Kernels")


def checked(
    load: Callable[[], Kernels], disagreement: Callable[[Kernels], str | None], otherwise: str
) -> Kernels | None:
    """What `load` gives, if `disagreement` finds nothing wrong with it; else None, said once: `otherwise`, and why.

    Kernels are written in Triton, which may be missing, or fails with errors of many kinds: no compiler, an old card.
    """
    try:
        kernels = load()
        reason = disagreement(kernels)
    except Exception as error:
        reason = f"Triton cannot be used ({str(error).partition(chr(10))[0] or type(error).__name__})"
    if reason is None:
        return kernels
    say_once(f"{otherwise}: {reason}")
    return None
