"""Operations on whole vectors that the card leaves out where a number on it says that they change nothing.

The host does not know that number when it queues them, and PyTorch's operations read and write every element whatever
it is: an update that stands is written over itself, a gradient that is within its limit is multiplied by 1. With Triton
they are kernels that look at the number first. Before their first use on a device these are held against PyTorch's
operations on small tensors. Where Triton is not installed, cannot serve or gives other numbers, and on processors,
PyTorch's operations serve; the results are the same to the bit.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wanlora.foundation.checked import checked

_FEW = 16
"""So many vectors at most are multiplied one after the other; more are faster together."""
_EACH, _PROGRAMS = 1024, 2048
"""Numbers that a program works on at a time, and programs at most: they fill the largest cards once."""
_SIZES = (1, 5, _EACH, 2 * _EACH + 16, _EACH * _PROGRAMS + 3)
"""Numbers of the vectors that are compared: one, some, a program's, several, more than one for each program."""


@dataclass(frozen=True, slots=True)
class Kernels:
    """What `restore` and `scale` do, for one contiguous vector of words or of float32; flag and factor are scalars."""

    restore: Callable[[Tensor, Tensor, Tensor], None]
    scale: Callable[[Tensor, Tensor], None]


def restore(sound: Tensor, new: Tensor, old: Tensor) -> None:
    """Write `old` over `new`, of the same shape and format, unless `sound`, a bool on their device."""
    if not (_has_words(new) and _has_words(old)):
        torch.where(sound, new, old, out=new)
        return
    new, old = _in_words(new), _in_words(old)
    kernels = _checked_kernels(new.device) if _is_on_card(new) else None
    if kernels:
        kernels.restore(sound, new, old)
    else:
        torch.where(sound, new, old, out=new)


def scale(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply all `tensors`, which are float32, by `factor`, a float32 number on their device."""
    if not tensors:
        return
    serves = len(tensors) <= _FEW and all(_is_on_card(tensor) and tensor.is_contiguous() for tensor in tensors)
    kernels = _checked_kernels(factor.device) if serves else None
    if kernels:
        for tensor in tensors:
            kernels.scale(tensor.view(-1), factor)
    else:
        torch._foreach_mul_(list(tensors), factor)


def _has_words(tensor: Tensor) -> bool:
    """Whether the memory of a tensor can be read eight bytes at a time."""
    sizes = (tensor.numel(), tensor.storage_offset())
    return tensor.is_contiguous() and all(size * tensor.element_size() % 8 == 0 for size in sizes)


def _in_words(tensor: Tensor) -> Tensor:
    """The same memory as numbers of eight bytes: choosing between bytes takes three times as long."""
    return tensor.detach().view(-1).view(torch.int64)


def _is_on_card(tensor: Tensor) -> bool:
    return tensor.is_cuda


@functools.cache
def _checked_kernels(device: torch.device) -> Kernels | None:
    """The kernels; None, said once, where Triton is missing, cannot compile them, or makes something else of them."""
    return checked(
        _load_kernels,
        lambda kernels: _disagreement(kernels, device),
        "gradients within their limit and updates that stand are read and written all the same, with an 8-bit "
        "optimizer 26 bytes a step for each number that is trained",
    )


def _load_kernels() -> Kernels:
    """The Triton kernels; importing them raises errors of many kinds."""
    from wanlora.training import conditional_triton

    def programs(count: int) -> tuple[int]:
        return (min(-(-count // _EACH), _PROGRAMS),)

    def restore(sound: Tensor, new: Tensor, old: Tensor) -> None:
        with torch.cuda.device(new.device):
            conditional_triton.overwrite[programs(new.numel())](sound, new, old, new.numel(), num_each=_EACH)

    def scale(vector: Tensor, factor: Tensor) -> None:
        with torch.cuda.device(vector.device):
            conditional_triton.multiply[programs(vector.numel())](vector, factor, vector.numel(), num_each=_EACH)

    return Kernels(restore, scale)


def _disagreement(kernels: Kernels, device: torch.device) -> str | None:
    """What the kernels get wrong on small vectors, or write beside them, in words; None if nothing."""
    for size in _SIZES:
        old = torch.arange(size + 2, device=device)
        new = -1 - old
        for sound in (True, False):
            expected, given = new.clone(), new.clone()
            expected[1:-1] = (new if sound else old)[1:-1]
            kernels.restore(torch.tensor(sound, device=device), given[1:-1], old[1:-1])
            if not torch.equal(given, expected):
                return f"its kernel does not put {size} numbers back as it should on {device}"
        values = torch.linspace(-1, 1, size + 2, device=device)
        values[1] = torch.finfo(torch.float32).tiny
        for number in (1.0, 0.3, float("nan")):
            expected, given = values.clone(), values.clone()
            factor = torch.tensor(number, device=device)
            expected[1:-1] *= factor
            kernels.scale(given[1:-1], factor)
            if not torch.equal(given.nan_to_num(), expected.nan_to_num()):
                return f"its kernel multiplies {size} numbers by {number} differently on {device}"
    return None
