"""Inputs that wait on the host."""

import weakref

import torch

from wanlora.memory.offload import InputOffload
from wanlora.memory.transfers import transfers_for

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
