"""What stays is not looked through again, and what was set aside is not kept."""

import gc
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch

from wanlora.foundation.garbage import collect, return_memory


class Ring:
    """Refers to itself, so it is there until the collector comes."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Other tests count what the collector sees."""
    yield
    gc.unfreeze()


def test_what_is_alive_is_not_looked_through_again() -> None:
    alive = [Ring() for _ in range(1000)]
    collect()
    seen = {id(one) for one in gc.get_objects()}
    assert not seen & {id(one) for one in alive}
    assert len(seen) < gc.get_freeze_count()


@pytest.mark.parametrize("collects", [collect, lambda: return_memory(torch.device("cpu"))])
def test_garbage_that_was_set_aside_alive_is_deleted(collects: Callable[[], None]) -> None:
    ring = Ring()
    watched = weakref.ref(ring)
    collect()
    del ring
    gc.collect()
    assert watched() is not None  # set aside: an ordinary collection does not see it
    collects()
    assert watched() is None
