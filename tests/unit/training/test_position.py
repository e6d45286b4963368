"""Which batches make up a step, however they are shared out and wherever a run goes on."""

from itertools import chain

from hypothesis import given
from hypothesis import strategies as st

from wanlora.foundation.ranks import Rank
from wanlora.training.position import Position, indexes_left, last_step, steps_left, steps_per_epoch

lengths = st.integers(1, 60)
shares = st.integers(1, 5)


@given(length=lengths, processes=shares, accumulation=shares)
def test_any_split_covers_an_epoch_once_and_in_order(length: int, processes: int, accumulation: int) -> None:
    per_step = processes * accumulation
    steps = list(steps_left(Position(), epoch_length=length, batches_per_step=per_step))
    assert [index for step in steps for index in range(step.start, step.stop)] == list(range(length))
    for step in steps:
        dealt = [list(step.of(Rank(index, processes))) for index in range(processes)]
        assert sorted(chain.from_iterable(dealt)) == list(range(step.start, step.stop))
        assert all(len(part) <= accumulation and part == sorted(part) for part in dealt)
    asked = [indexes_left(steps, Rank(index, processes)) for index in range(processes)]
    assert sorted(chain.from_iterable(asked)) == list(range(length))


@given(length=lengths, per_step=st.integers(1, 12), done=st.integers(0, 200))
def test_going_on_from_any_position_gives_the_steps_that_were_left(length: int, per_step: int, done: int) -> None:
    position = Position()
    for _ in range(done):
        left = list(steps_left(position, epoch_length=length, batches_per_step=per_step))
        after = position.after(len(left[0]), epoch_length=length)
        rest = list(steps_left(after, epoch_length=length, batches_per_step=per_step))
        assert rest == left[1:] if after.epoch == position.epoch else len(left) == 1
        position = after
    assert position.step == done
    assert position.epoch == done // steps_per_epoch(length, per_step)


@given(length=lengths, per_step=st.integers(1, 12), epochs=st.integers(1, 4), done=st.integers(0, 80))
def test_the_last_step_is_the_same_from_every_position_on_the_way(
    length: int, per_step: int, epochs: int, done: int
) -> None:
    whole = epochs * steps_per_epoch(length, per_step)
    position = Position()
    for _ in range(min(done, whole)):
        step = next(steps_left(position, epoch_length=length, batches_per_step=per_step))
        position = position.after(len(step), epoch_length=length)
    assert last_step(epochs, position, epoch_length=length, batches_per_step=per_step) == whole


def test_epochs_of_another_length_before_do_not_shorten_the_run() -> None:
    after_two_long_epochs = Position(step=20, epoch=2)
    assert last_step(4, after_two_long_epochs, epoch_length=5, batches_per_step=1) == 30
    assert last_step(2, after_two_long_epochs, epoch_length=5, batches_per_step=1) == 20
