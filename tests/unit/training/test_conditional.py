"""What the card may leave out: the kernels are trusted only where they give what PyTorch's operations give."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.training.parts import Velocity, indexed, measure, step_of
from wanlora.foundation.log import log
from wanlora.training import conditional
from wanlora.training.conditional import Kernels, restore, scale
from wanlora.training.position import Position

SOUND, BROKEN = torch.tensor(True), torch.tensor(False)
LESS = torch.tensor(0.3)
is_on_card = conditional._is_on_card


class Counted:
    """Kernels that do what they should, and the sizes of what they were given after they were compared."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def restore(self, sound: Tensor, new: Tensor, old: Tensor) -> None:
        assert new.dtype == old.dtype == torch.int64 and new.shape == old.shape == (len(new),)
        self.calls.append(("restore", len(new)))
        new.copy_(torch.where(sound, new, old))

    def scale(self, vector: Tensor, factor: Tensor) -> None:
        assert vector.shape == (len(vector),) and factor.shape == ()
        self.calls.append(("scale", len(vector)))
        vector *= factor

    @property
    def kernels(self) -> Kernels:
        return Kernels(self.restore, self.scale)


@pytest.fixture(autouse=True)
def _card(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Tensors count as a card's, nothing is remembered, and what is said is seen."""
    monkeypatch.setattr(conditional, "_is_on_card", lambda tensor: True)
    monkeypatch.setattr("wanlora.foundation.log._said", set())
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level(logging.INFO, logger="wanlora")
    conditional._checked_kernels.cache_clear()
    yield
    conditional._checked_kernels.cache_clear()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    """Kernels that have been compared."""
    made = Counted()
    monkeypatch.setattr(conditional, "_load_kernels", lambda: made.kernels)
    assert conditional._checked_kernels(torch.device("cpu"))
    assert {name for name, _ in made.calls} == {"restore", "scale"}
    made.calls.clear()
    return made


def tensors() -> dict[str, Tensor]:
    numbers = torch.Generator().manual_seed(0)
    return {
        "vector": torch.randn(10, generator=numbers),
        "states": torch.arange(24, dtype=torch.uint8),
        "odd states": torch.arange(7, dtype=torch.uint8),
        "not aligned": torch.arange(25, dtype=torch.uint8)[1:],
        "matrix": torch.randn(4, 6, generator=numbers),
        "turned": torch.randn(4, 6, generator=numbers).T,
        "with gaps": torch.randn(4, 6, generator=numbers)[:, ::2],
        "number": torch.tensor(3.0),
        "no numbers": torch.tensor([float("nan"), -0.0, float("inf"), 1.0]),
    }


WORDS = {"vector": 5, "states": 3, "matrix": 12, "no numbers": 2}
"""Those that consist of words of eight bytes."""


def bits(tensor: Tensor) -> list[int]:
    found: list[int] = tensor.contiguous().view(-1).view(torch.uint8).tolist()
    return found


@pytest.mark.parametrize("name", tensors())
@pytest.mark.parametrize("sound", [SOUND, BROKEN])
def test_the_former_is_put_back_to_the_bit_unless_all_was_sound(name: str, sound: Tensor, counted: Counted) -> None:
    new = tensors()[name]
    old = new.clone()
    new.add_(1)
    expected = bits(new if sound else old)
    restore(sound, new, old)
    assert bits(new) == expected
    assert counted.calls == ([("restore", WORDS[name])] if name in WORDS else [])


def test_a_copy_that_lies_otherwise_is_put_back_by_its_places(counted: Counted) -> None:
    new, old = torch.zeros(4, 6), torch.arange(24.0).view(6, 4).T
    restore(BROKEN, new, old)
    assert torch.equal(new, old) and not counted.calls


def test_few_vectors_are_multiplied_one_by_one_and_many_together(
    counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conditional, "_FEW", 3)
    for count in (0, 1, 3, 4):
        given = [torch.randn(2 + number, 3) for number in range(count)]
        expected = [tensor * LESS for tensor in given]
        scale(given, LESS)
        assert all(map(torch.equal, given, expected))
        assert len(counted.calls) == (count if count <= 3 else 0)
        counted.calls.clear()


def test_gradients_that_do_not_lie_in_one_piece_are_multiplied_by_the_operation(counted: Counted) -> None:
    given = torch.randn(4, 6).T
    expected = given * LESS
    scale([given], LESS)
    assert torch.equal(given, expected) and not counted.calls


def test_a_step_clips_as_torch_does_and_asks_for_nothing_without_a_limit(counted: Counted) -> None:
    for limit in (0.0, 0.01, 100.0):
        model, plain = Velocity(), Velocity()
        step = step_of(model, flat=True, max_grad_norm=limit)
        report = measure(step, indexed([0, 1]), Position(), 2)
        measure(step_of(plain), indexed([0, 1]), Position(), 2)
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), limit or float("inf"))
        assert report.grad_norm == norm.item()
        (vector,) = step.parameters
        assert vector.grad is not None and plain.mix.grad is not None
        assert torch.equal(vector.grad, plain.mix.grad.flatten())
        assert counted.calls == ([("scale", len(vector))] if limit else [])
        counted.calls.clear()


def over_all(sound: Tensor, new: Tensor, old: Tensor) -> None:
    new.copy_(old)


def over_nothing(sound: Tensor, new: Tensor, old: Tensor) -> None:
    pass


def over_more(sound: Tensor, new: Tensor, old: Tensor) -> None:
    Counted().restore(sound, new, old)
    new.as_strided((1,), (1,), new.storage_offset() + len(new)).zero_()


def not_the_last(vector: Tensor, factor: Tensor) -> None:
    vector[:-1] *= factor


def only_less(vector: Tensor, factor: Tensor) -> None:
    if factor < 1:
        vector *= factor


def roughly(vector: Tensor, factor: Tensor) -> None:
    vector *= factor * (1 + 2**-22)


def raising(*tensors: Tensor) -> None:
    raise RuntimeError("Failed to find C compiler\nand more")


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        ({"restore": over_all}, "does not put 1 numbers back as it should on cpu"),
        ({"restore": over_nothing}, "does not put 1 numbers back"),
        ({"restore": over_more}, "does not put 1 numbers back"),
        ({"scale": not_the_last}, "multiplies 1 numbers by 0.3 differently on cpu"),
        ({"scale": only_less}, "multiplies 1 numbers by nan differently"),
        ({"scale": roughly}, "multiplies 1 numbers by 1.0 differently"),
        ({"restore": raising}, "Triton cannot be used (Failed to find C compiler)"),
        (None, "Triton cannot be used (No module named 'triton')"),
    ],
)
def test_kernels_that_are_wrong_missing_or_fail_give_way_to_the_operations(
    kernel: dict[str, Callable[..., None]] | None,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def load() -> Kernels:
        if kernel is None:
            raise ImportError("No module named 'triton'")
        right: Any = {"restore": Counted().restore, "scale": Counted().scale}
        return Kernels(**{**right, **kernel})

    monkeypatch.setattr(conditional, "_load_kernels", load)
    for _ in range(2):
        new, old, gradient = torch.ones(4), torch.zeros(4), torch.ones(3)
        restore(BROKEN, new, old)
        scale([gradient], LESS)
        assert torch.equal(new, old) and torch.equal(gradient, LESS.expand(3))
    (message,) = caplog.messages
    assert said in message and "26 bytes a step for each number" in message


def test_processors_do_without_triton_and_say_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(conditional, "_is_on_card", is_on_card)
    new, gradient = torch.ones(4), torch.ones(3)
    restore(BROKEN, new, torch.zeros(4))
    scale([gradient], LESS)
    assert not new.any() and torch.equal(gradient, LESS.expand(3))
    assert not caplog.messages and conditional._checked_kernels.cache_info().currsize == 0
