"""Where the time of a start goes."""

from collections.abc import Iterator
from contextlib import suppress

from wanlora.foundation.laps import Laps


def ticking(*moments: float) -> Iterator[float]:
    yield from moments


def test_parts_are_shown_in_their_order_and_short_ones_are_left_out() -> None:
    moments = ticking(3.0, 4.5, 4.51, 6.51)
    laps = Laps(1.0, lambda: next(moments))
    for name in ("imports", "weights", "device", "weights"):
        laps.lap(name)
    assert laps.finish() == "start: 5.5 s: imports 2.0, weights 3.5"


def test_what_took_long_within_a_lap_is_named_beside_it() -> None:
    moments = ticking(2.0, 3.0, 3.5, 3.51, 3.6, 4.6, 5.0, 6.0)
    laps = Laps(1.0, lambda: next(moments))
    laps.lap("imports")
    for name in ("optimizer", "data", "optimizer"):
        with laps.part(name):
            pass
    laps.lap("checks")
    assert laps.finish() == "start: 5.0 s: imports 1.0, checks 4.0 (optimizer 0.9, data 0.1)"


def test_a_part_counts_also_if_it_fails_and_short_ones_are_left_out() -> None:
    moments = ticking(1.0, 2.0, 2.0, 2.01, 3.0)
    laps = Laps(0.0, lambda: next(moments))
    with suppress(KeyError), laps.part("data"):
        raise KeyError
    with laps.part("card"):
        pass
    laps.lap("checks")
    assert laps.finish() == "start: 3.0 s: checks 3.0 (data 1.0)"


def test_a_second_start_counts_from_its_own_beginning() -> None:
    moments = ticking(2.0, 100.0, 103.0)
    laps = Laps(0.0, lambda: next(moments))
    laps.begin()  # the first counts from the import
    laps.lap("imports")
    assert laps.finish() == "start: 2.0 s: imports 2.0"
    laps.begin()
    laps.lap("checks")
    assert laps.finish() == "start: 3.0 s: checks 3.0"
