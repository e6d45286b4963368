"""The first values of the down factors, drawn while something else is done.

A network of rank 32 on a 14B model begins with 77 million random numbers. One generator draws them one after another,
which takes 0.7 s and cannot be shared out without making them other numbers. It needs nothing of the model but its
sizes, so a thread draws while the model is read: same generator, same order, same bits.
"""

import math
import threading
from collections.abc import Mapping
from concurrent.futures import Future

import torch
from torch import Tensor, nn


def draw_down(rank: int, num_in: int, generator: torch.Generator) -> Tensor:
    """A down factor [rank, in] float32 of an untrained adapter, by a generator on the CPU."""
    drawn = torch.empty(rank, num_in)
    nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
    return drawn


def drawing_downs(shapes: Mapping[str, tuple[int, int]], generator: torch.Generator) -> Future[dict[str, Tensor]]:
    """Down factors of these shapes [rank, in], by name, in the order of `shapes`; a thread draws them from now on."""
    drawn: Future[dict[str, Tensor]] = Future()

    def draw() -> None:
        try:
            drawn.set_result({name: draw_down(*shape, generator) for name, shape in shapes.items()})
        except BaseException as error:
            drawn.set_exception(error)

    threading.Thread(target=draw, daemon=True).start()
    return drawn
