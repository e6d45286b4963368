"""What stays is not looked through again, and what was set aside is not kept for ever."""

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch

from wanlora.foundation.garbage import return_memory, set_aside


class Ring:
    """Refers to itself, so it is there until the collector comes."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Other tests count what the collector sees."""
    yield
    gc.unfreeze()


def test_what_is_alive_is_not_looked_through_again_and_garbage_is_deleted() -> None:
    alive = [Ring() for _ in range(1000)]
    watched = weakref.ref(Ring())
    set_aside()
    assert watched() is None
    seen = {id(one) for one in gc.get_objects()}
    assert not seen & {id(one) for one in alive}
    assert len(seen) < gc.get_freeze_count()


def test_garbage_that_was_set_aside_alive_is_deleted_where_memory_is_wanted() -> None:
    ring = Ring()
    watched = weakref.ref(ring)
    set_aside()
    del ring
    set_aside()
    assert watched() is not None
    return_memory(torch.device("cpu"))
    assert watched() is None
