"""Before a step the ring gets as many buffers as the step's sizes leave room for."""

import logging

import pytest
import torch

from tests.unit.memory.wan import ARGUMENTS, adapted_wan
from wanlora.foundation import log as logs
from wanlora.memory.outlook import Load
from wanlora.memory.refilling import FreedMemory
from wanlora.memory.residency import Residency
from wanlora.memory.streaming import BlockStream

SMALL, MIDDLE, LARGE = (Load(tokens=tokens) for tokens in (10, 20, 30))
NUMBERS = {SMALL: 0, MIDDLE: 2, LARGE: 4}


def streaming(num_streamed: int = 6) -> BlockStream:
    stream = BlockStream(list(adapted_wan(6).blocks), num_streamed, torch.device("cpu"))
    stream.attach()
    return stream


def test_the_ring_holds_what_a_size_does_not_want_swapped() -> None:
    stream = streaming()
    residency = Residency(stream, NUMBERS)
    rings = []
    for load in (LARGE, SMALL, MIDDLE, SMALL, LARGE):
        changed = residency.prepare([load])
        rings.append((stream.ring_size, changed))
    assert rings == [(2, False), (6, True), (4, True), (6, True), (2, True)]


def test_a_step_on_several_batches_has_the_ring_of_the_one_that_wants_most_swapped() -> None:
    stream = streaming()
    residency = Residency(stream, NUMBERS)
    residency.prepare([SMALL, MIDDLE, SMALL])
    assert stream.ring_size == 4
    residency.prepare([SMALL, Load(tokens=11)])  # which nobody knows
    assert stream.ring_size == 2


def test_a_step_that_needs_much_lets_buffers_go_in_its_forward() -> None:
    stream = streaming()
    slot = stream._slot_bytes
    residency = Residency(stream, NUMBERS)

    def behind_a_small_one(load: Load) -> tuple[int, int, int]:
        residency.prepare([SMALL])
        residency.prepare([load])
        return residency.buffers, residency.passing // slot, stream.ring_size

    assert behind_a_small_one(LARGE) == (2, 0, 2)  # nobody knows yet what it needs
    residency.note([LARGE], 6 * slot)
    assert behind_a_small_one(LARGE) == (2, 3, 5)
    residency.note([LARGE], 60 * slot)
    assert behind_a_small_one(LARGE) == (2, 4, 6)
    assert behind_a_small_one(MIDDLE) == (4, 0, 4)
    residency.note([LARGE, MIDDLE], 1)  # of steps on several batches nothing is known
    residency.prepare([SMALL])
    residency.prepare([LARGE, LARGE])
    assert residency.passing == 0 and not residency.stop_passing()
    assert behind_a_small_one(LARGE) == (2, 4, 6)
    assert residency.stop_passing()
    assert behind_a_small_one(LARGE) == (2, 0, 2) and not residency.stop_passing()
    residency.note([LARGE], None)


def test_buffers_that_were_gone_when_memory_ran_out_go_on_passing() -> None:
    model = adapted_wan(6)
    stream = BlockStream(list(model.blocks), 6, torch.device("cpu"))
    stream.attach()
    residency = Residency(stream, NUMBERS)
    residency.note([LARGE], 60 * stream._slot_bytes)

    def behind_a_small_one() -> int:
        residency.prepare([SMALL])
        residency.prepare([LARGE])
        return stream.ring_size

    assert behind_a_small_one() == 6
    model(*ARGUMENTS)
    assert stream.ring_size == 2 and not residency.stop_passing()
    stream.reset()
    assert behind_a_small_one() == 6 and residency.stop_passing()
    assert behind_a_small_one() == 2


def test_a_number_for_all_leaves_the_ring_as_it_is() -> None:
    stream = streaming(4)
    residency = Residency(stream, {})
    assert not any(residency.prepare(loads) for loads in ([SMALL], [LARGE], []))
    assert stream.ring_size == 2 and residency.give_up([SMALL]) == 0


def test_between_steps_the_ring_shrinks_to_the_least() -> None:
    stream = streaming()
    residency = Residency(stream, NUMBERS)
    residency.prepare([SMALL])
    residency.shrink()
    assert stream.ring_size == 2
    assert residency.prepare([SMALL]) and stream.ring_size == 6


def test_a_size_that_was_given_up_has_the_smallest_ring_and_others_keep_theirs() -> None:
    stream = streaming(4)
    residency = Residency(stream, {SMALL: 0, MIDDLE: 1, LARGE: 2})
    residency.prepare([SMALL])
    assert residency.give_up([SMALL]) == 2 and residency.give_up([SMALL]) == 0
    residency.prepare([SMALL])
    assert stream.ring_size == 2
    residency.shrink()
    stream.stream_more(2)
    for load, ring in ((SMALL, 2), (MIDDLE, 5), (LARGE, 4)):
        residency.prepare([load])
        assert stream.ring_size == ring


def test_blocks_that_no_memory_is_there_for_are_swapped_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logs.log, "propagate", True)
    stream = streaming()
    residency = Residency(stream, NUMBERS)
    with monkeypatch.context() as patch:

        def run_out() -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

        patch.setattr(stream, "_make_slot", run_out)
        assert not residency.prepare([SMALL])
    assert stream.ring_size == 2 and "batches of 10 tokens: they are swapped from now on" in caplog.text
    assert caplog.records[0].levelno == logging.WARNING
    assert not residency.prepare([SMALL]) and residency.prepare([MIDDLE])


def test_behind_a_large_batch_the_ring_may_grow_to_that_of_the_smallest() -> None:
    held = [0]
    stream = streaming()
    residency = Residency(stream, {SMALL: 1, LARGE: 4})
    residency.prepare([LARGE])
    freed = FreedMemory(lambda: held[0])
    residency.refill(freed)
    stream._before_backward(5)
    held[0] -= 10**9  # the largest piece is left alone
    stream._before_backward(4)
    assert stream.ring_size == 2 == residency.buffers
    held[0] -= 10**9
    stream._before_backward(3)
    assert stream.ring_size == 5 and residency.buffers == 2
    assert not residency.prepare([SMALL]) or residency.buffers == 5
    assert residency.prepare([LARGE]) and stream.ring_size == 2 == residency.buffers
