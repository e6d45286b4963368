"""Kernels that the card leaves out: the bits of PyTorch's operations, in the order of a stream, and no waiting."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from wanlora.training import conditional
from wanlora.training.conditional import restore, scale

pytestmark = pytest.mark.gpu

CARD = torch.device("cuda", 0)
_MANY = conditional._EACH * conditional._PROGRAMS
"""Numbers for which every program has some."""
_MOST = 3 * _MANY + 5


def floats(size: int = _MOST) -> Tensor:
    return torch.randn(size, device=CARD)


def states(size: int) -> Tensor:
    return torch.randint(0, 256, (size,), device=CARD, dtype=torch.uint8)


TENSORS: dict[str, Callable[[], Tensor]] = {
    "vector": lambda: floats(_MOST + 1),
    "odd vector": floats,
    "states": lambda: states(8 * _MOST),
    "odd states": lambda: states(_MANY + 3),
    "not aligned": lambda: states(_MANY + 8)[8:],
    "half a word off": lambda: floats(_MANY + 1)[1:],
    "scales of blocks": lambda: floats(514),
    "one word": lambda: floats(2),
    "number": lambda: torch.tensor(3.0, device=CARD),
    "wider": lambda: floats(40).double(),
    "turned": lambda: floats(600).view(20, 30).T,
    "with gaps": lambda: floats(600).view(20, 30)[:, ::2],
    "no numbers": lambda: torch.tensor([float("nan"), -0.0, float("inf"), 1.0], device=CARD),
}


@contextmanager
def nobody_waits() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8))


def test_the_kernels_serve_here() -> None:
    assert conditional._checked_kernels(CARD) is not None


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("sound", [True, False])
def test_the_former_is_put_back_unless_all_was_sound(name: str, sound: bool) -> None:
    conditional._checked_kernels(CARD)
    new = TENSORS[name]()
    old = new.clone()
    new.add_(1)
    expected, flag = (new if sound else old).clone(), torch.tensor(sound, device=CARD)
    with nobody_waits():
        restore(flag, new, old)
    assert same_bits(new, expected)


@pytest.mark.parametrize("number", [1.0, 0.3, 1e-30, 0.0, float("nan"), float("inf")])
def test_products_are_those_of_the_operation(number: float) -> None:
    conditional._checked_kernels(CARD)
    given = [floats(), floats(_MANY), floats(3), floats(_MANY + 1)[1:], floats(1) * 1e-40, floats(600).view(20, 30)]
    expected, factor = [tensor.clone() for tensor in given], torch.tensor(number, device=CARD)
    torch._foreach_mul_(expected, factor)
    with nobody_waits():
        scale(given, factor)
    assert all(torch.equal(*(tensor.nan_to_num(7.0) for tensor in pair)) for pair in zip(given, expected, strict=True))


def test_kernels_run_behind_what_their_stream_does_before() -> None:
    conditional._checked_kernels(CARD)
    stream = torch.cuda.Stream(CARD)
    new, old, vector = floats(), floats(), floats()
    sound, factor = torch.ones((), dtype=torch.bool, device=CARD), torch.ones((), device=CARD)
    expected, products = old.clone(), vector * 0.5
    torch.cuda.synchronize()
    with torch.cuda.stream(stream), nobody_waits():
        torch.cuda._sleep(50_000_000)
        sound.zero_()
        factor.fill_(0.5)
        restore(sound, new, old)
        scale([vector], factor)
    stream.synchronize()
    assert torch.equal(new, expected) and torch.equal(vector, products)
