"""Modules without memory: shapes and names to check a file against, or places to put what is read.

On the meta device the first random normal number or the first division (with torch 2.7 the first ones or zeros, too)
makes torch import its compiler and a library for algebra, which takes longer than all checks of a start together; and
what is drawn there is nowhere.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_FILLED = (torch.ones, torch.zeros)


class _NoValues(TorchFunctionMode):
    """Functions of `torch.nn.init` do nothing and return their tensor; nothing is filled with ones or zeros."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", "") == torch.nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return (torch.empty if func in _FILLED else func)(*args, **(kwargs or {}))


@contextmanager
def without_memory() -> Iterator[None]:
    """Modules that are made within have parameters on the meta device, to which no values are given."""
    with torch.device("meta"), _NoValues():
        yield
