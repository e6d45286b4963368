"""A block's frozen weights in one piece of host memory.

One flat buffer means one copy per block instead of one per tensor, and a device buffer of the same layout can hold
any block of that size. Tensors keep their identity: only the memory they look at changes (`tensor.data`), so modules,
adapters and autograd see the same objects whether a block is here or there. A block that is not on the device looks
at its master on the host, so using it by mistake is an error about devices and never a wrong number.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wanlora.memory.pinned import pinned_buffer, unpin

_ALIGNMENT = 256


def frozen_tensors(module: nn.Module) -> list[Tensor]:
    """Every parameter and buffer that is not trained, each once."""
    tensors = [*module.parameters(), *module.buffers()]
    return list({id(tensor): tensor for tensor in tensors if not tensor.requires_grad}.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where in a flat buffer a tensor lies."""

    start: int
    shape: torch.Size
    dtype: torch.dtype
    strides: tuple[int, ...]

    @property
    def end(self) -> int:
        """One past the last byte."""
        return self.start + math.prod(self.shape) * self.dtype.itemsize


def lay_out(tensors: list[Tensor]) -> tuple[list[Place], int]:
    """Places of `tensors` one after another, each aligned for vector loads, and the bytes they take."""
    places: list[Place] = []
    end = 0
    for tensor in tensors:
        strides = tuple(math.prod(tensor.shape[place + 1 :]) for place in range(tensor.ndim))
        places.append(Place(start=end, shape=tensor.shape, dtype=tensor.dtype, strides=strides))
        end = -(-places[-1].end // _ALIGNMENT) * _ALIGNMENT
    return places, end


def views(flat: Tensor, places: list[Place]) -> list[Tensor]:
    """The tensors in `flat` uint8, whose size is a multiple of the alignment."""
    typed = {dtype: flat.view(dtype) for dtype in {place.dtype for place in places}}
    return [
        typed[place.dtype].as_strided(place.shape, place.strides, place.start // place.dtype.itemsize)
        for place in places
    ]


class BlockMaster:
    """The one lasting copy of a block's frozen weights, on the host.

    Building it moves the weights here from wherever they are, and frees them there.
    """

    def __init__(self, block: nn.Module, *, device: torch.device, pin: bool = True) -> None:
        self.tensors = frozen_tensors(block)
        self.places, self.num_bytes = lay_out(self.tensors)
        self.flat = pinned_buffer(self.num_bytes, device=device, pin=pin)
        self.on_host = self.views(self.flat)
        for tensor, value in zip(self.tensors, self.on_host, strict=True):
            value.copy_(tensor.data)
        self.point_to(self.on_host)

    def views(self, flat: Tensor) -> list[Tensor]:
        """This block's tensors in a buffer of the same layout."""
        return views(flat, self.places)

    def point_to(self, values: list[Tensor]) -> None:
        """Make the block's tensors look at `values`, in the order of `views`."""
        for tensor, value in zip(self.tensors, values, strict=True):
            tensor.data = value

    def dissolve(self, device: torch.device) -> None:
        """Give the weights memory of their own on `device`."""
        unpin(self.flat)
        self.point_to([value.to(device) for value in self.on_host])
