"""Inputs that wait on the host."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from wanlora.memory.offload import InputOffload
from wanlora.memory.transfers import DirectTransfers, transfers_for

CPU = torch.device("cpu")


def test_an_input_is_let_go_in_between_and_comes_back_for_backward() -> None:
    offload = InputOffload(CPU, transfers_for(CPU))
    leaf = torch.arange(1.0, 5.0, requires_grad=True)
    chosen = leaf * 2
    gone = weakref.ref(chosen)
    with offload.keep(chosen):
        squared = chosen.square()
    del chosen
    assert gone() is None
    squared.sum().backward()
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, 8 * leaf.detach())


def test_other_tensors_are_saved_as_ever() -> None:
    offload = InputOffload(CPU, transfers_for(CPU))
    chosen = torch.ones(3, requires_grad=True)
    other = torch.full((3,), 2.0, requires_grad=True)
    with offload.keep(chosen):
        product = chosen * other
    assert offload.buffers.num_bytes == 12
    product.sum().backward()
    torch.testing.assert_close(chosen.grad, other.detach())


class Counted(DirectTransfers):
    """Copies with numbers for marks; notes which of them computation was told to wait for."""

    def __init__(self) -> None:
        self.copies = 0
        self.waited: list[Any] = []

    def copy(self, target: Tensor, source: Tensor, *, after: Any = None) -> Any:
        super().copy(target, source)
        self.copies += 1
        return self.copies

    def wait(self, mark: Any) -> None:
        self.waited.append(mark)


def chain(offload: InputOffload, leaf: Tensor, links: int) -> Tensor:
    """Squares of squares, each from an input that waits on the host."""
    x = leaf * 1
    for _ in range(links):
        with offload.keep(x):
            x = x.square() / 2
    return x


def test_memory_is_used_anew_only_behind_its_copy() -> None:
    """Two inputs may be leaving at a time; on the way back computation waits for each before it is used."""
    transfers = Counted()
    offload = InputOffload(CPU, transfers)
    leaf = torch.tensor([1.5, -2.0], requires_grad=True)
    out = chain(offload, leaf, 5)
    assert transfers.copies == 5 and transfers.waited == [1, 2, 3]
    out.sum().backward()
    assert transfers.copies == 10 and transfers.waited == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    plain = torch.tensor([1.5, -2.0], requires_grad=True)
    x = plain * 1
    for _ in range(5):
        x = x.square() / 2
    x.sum().backward()
    torch.testing.assert_close(leaf.grad, plain.grad)


def test_what_a_failed_pass_asked_for_is_waited_for_and_never_taken_for_something_else() -> None:
    transfers = Counted()
    offload = InputOffload(CPU, transfers)
    leaf = torch.tensor([1.5, -2.0], requires_grad=True)
    out = chain(offload, leaf, 3)

    def fail(grad: Tensor) -> None:
        raise RuntimeError("out of memory")

    out.register_hook(lambda grad: None)
    with offload.keep(out):
        last = out.square()
    out.register_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        last.sum().backward()  # the last link's input is back, and the one before it is on its way
    del out, last
    gc.collect()
    asked, waited = transfers.copies, len(transfers.waited)
    again = chain(offload, leaf, 3)
    assert transfers.waited[waited] == asked
    again.sum().backward()
    expected = torch.tensor([1.5, -2.0], requires_grad=True)
    chain(InputOffload(CPU, DirectTransfers()), expected, 3).sum().backward()
    torch.testing.assert_close(leaf.grad, expected.grad)
