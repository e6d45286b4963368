"""Settings are tried until they fit, and the fastest of those that fit are taken."""

from dataclasses import replace

import pytest

from tests.unit.memory.test_outlook import BLOCK, GIB, LARGEST, LOADS, REFERENCE
from wanlora.memory.cards import CARDS
from wanlora.memory.choices import (
    WORTH,
    Swapping,
    best_swapped,
    cures,
    faster,
    fewest_swapped,
    fits,
    host_bytes,
    total_seconds,
)
from wanlora.memory.outlook import Load

BATCHES = dict(zip(LOADS, (120, 240, 240, 480), strict=True))
"""An epoch of the reference run."""
ROOM = int(21.6 * GIB)
CARD = CARDS["RTX 4090"]


def test_the_fewest_swapped_blocks_are_one_more_than_too_few() -> None:
    room = int(15.6 * GIB)
    number = fewest_swapped(REFERENCE, LOADS, room)
    assert number is not None
    assert fits(replace(REFERENCE, swapped=number), LOADS, room)
    assert not fits(replace(REFERENCE, swapped=number - 1), LOADS, room)
    assert fewest_swapped(REFERENCE, LOADS, 80 * GIB) == 0
    assert fewest_swapped(REFERENCE, LOADS, 5 * GIB) is None


def test_what_previews_take_beside_the_model_counts_too() -> None:
    room = 24 * GIB
    assert fewest_swapped(REFERENCE, LOADS, room) == 0
    besides = room - sum(REFERENCE.resting().values())
    assert fewest_swapped(REFERENCE, LOADS, room, besides=besides) == 10


def test_every_cure_fits() -> None:
    heavy = replace(
        REFERENCE,
        maths=replace(REFERENCE.maths, fp8=False),
        formats=replace(REFERENCE.formats, fp8=False),
        recompute=False,
        swapped=0,
    )
    room = int(21.5 * GIB)
    found = cures(heavy, BATCHES, room)
    assert all(fits(outlook, LOADS, room) for outlook in found.values())
    assert next(iter(found)) == "--fp8_base --fp8_scaled --gradient_checkpointing --gradient_checkpointing_cpu_offload"
    more = "--fp8_base --fp8_scaled --gradient_checkpointing --blocks_to_swap "
    assert any(flags.startswith(more) for flags in found) and "--gradient_checkpointing --blocks_to_swap 20" in found
    for flags, outlook in found.items():
        assert ("fp8" in flags) == outlook.maths.fp8
        assert ("--gradient_checkpointing" in flags) == outlook.recompute
    assert cures(REFERENCE, BATCHES, 3 * GIB) == {}


def test_doing_without_transposed_weights_is_the_first_cure() -> None:
    both = replace(REFERENCE, swapped=0, transposed=True)
    room = both.peak(LARGEST) - 1
    assert next(iter(cures(both, BATCHES, room))) == "--fp8_fast_transposed off"
    found = cures(both, BATCHES, int(15.6 * GIB))
    assert found and all(flags.startswith("--fp8_fast_transposed off --") for flags in found)
    assert all(fits(outlook, LOADS, int(15.6 * GIB)) and not outlook.transposed for outlook in found.values())


def test_more_blocks_are_swapped_than_suffice_where_the_data_takes_less_time_so() -> None:
    choice = best_swapped(REFERENCE, BATCHES, ROOM, CARD)
    assert choice is not None and choice.number > choice.fewest + 10
    times = [total_seconds(replace(REFERENCE, swapped=n), BATCHES, ROOM, CARD) for n in range(39)]
    possible = times[choice.fewest :]
    assert times[choice.number] * (1 - WORTH) <= min(possible)
    assert all(taken * (1 - WORTH) > min(possible) for taken in times[choice.fewest : choice.number])
    assert choice.gain == pytest.approx(1 - times[choice.number] / times[choice.fewest]) and choice.gain > 0.1


def test_no_more_are_swapped_than_suffice_where_little_is_gained() -> None:
    small = {Load(tokens=256): 100}
    assert best_swapped(REFERENCE, small, ROOM, CARD) == Swapping(number=0, fewest=0)
    assert best_swapped(REFERENCE, BATCHES, 75 * GIB, CARDS["H100"]) == Swapping(number=0, fewest=0)
    whole = replace(REFERENCE, recompute=False)  # what blocks keep is decided before memory is looked at
    fewest = fewest_swapped(whole, LOADS, 50 * GIB)
    assert fewest and best_swapped(whole, BATCHES, 50 * GIB, CARD) == Swapping(number=fewest, fewest=fewest)


def test_copies_that_no_computation_hides_are_not_worth_it() -> None:
    choice = best_swapped(REFERENCE, BATCHES, ROOM, replace(CARD, link=1.0))
    assert choice is not None and choice.number == choice.fewest


def test_the_sizes_that_come_often_decide() -> None:
    slow = replace(CARD, link=12.0)
    seldom, often = ({LOADS[1]: 1000, LARGEST: number} for number in (1, 1000))
    few, many = (best_swapped(REFERENCE, batches, ROOM, slow) for batches in (seldom, often))
    assert few is not None and many is not None and few.fewest == many.fewest
    assert few.number < many.number


def test_system_memory_bounds_what_is_swapped_for_speed_only() -> None:
    best = best_swapped(REFERENCE, BATCHES, ROOM, CARD)
    bounded = best_swapped(REFERENCE, BATCHES, ROOM, CARD, host=12 * BLOCK)
    assert best is not None and bounded is not None
    assert bounded.fewest < bounded.number <= 10 < best.number
    assert host_bytes(replace(REFERENCE, swapped=10), LOADS) == 12 * BLOCK
    poor = best_swapped(REFERENCE, BATCHES, ROOM, CARD, host=0)
    assert poor == Swapping(number=best.fewest, fewest=best.fewest)


def test_without_rates_the_fewest_are_taken_and_without_room_none() -> None:
    fewest = fewest_swapped(REFERENCE, LOADS, ROOM)
    assert fewest is not None and best_swapped(REFERENCE, BATCHES, ROOM, None) == Swapping(number=fewest, fewest=fewest)
    assert best_swapped(REFERENCE, BATCHES, 5 * GIB, CARD) is None


def test_settings_that_are_faster_are_named_with_what_they_spare() -> None:
    choice = best_swapped(REFERENCE, BATCHES, ROOM, CARD)
    assert choice is not None
    found = faster(replace(REFERENCE, swapped=choice.fewest), BATCHES, ROOM, CARD)
    assert next(iter(found)) == f"--blocks_to_swap {choice.number}"
    assert found[f"--blocks_to_swap {choice.number}"] == pytest.approx(choice.gain)
    assert faster(replace(REFERENCE, swapped=choice.number), BATCHES, ROOM, CARD) == {}
    assert faster(replace(REFERENCE, swapped=choice.fewest), BATCHES, ROOM, CARD, host=0) == {}


def test_keeping_inputs_on_the_host_is_proposed_where_attention_fits_for_it() -> None:
    card, room = CARDS["RTX 4070"], int(10.2 * GIB)
    choice = best_swapped(REFERENCE, BATCHES, room, card)
    assert choice is not None
    present = replace(REFERENCE, swapped=choice.number)
    ((flags, spared),) = faster(present, BATCHES, room, card).items()
    assert flags.startswith("--gradient_checkpointing_cpu_offload") and spared > WORTH
    swapped = int(flags.rpartition(" ")[2]) if "swap" in flags else present.swapped
    changed = replace(present, offload=True, swapped=swapped)
    assert changed.most_kept(LARGEST, room).attention > present.most_kept(LARGEST, room).attention
    assert fits(changed, LOADS, room)
    assert faster(present, BATCHES, room, card, host=host_bytes(present, LOADS)) == {}
    assert faster(replace(present, offload=True), BATCHES, room, replace(card, link=2.0)).keys().isdisjoint({flags})


def test_cures_are_the_fastest_numbers_of_blocks_and_come_in_order_of_time() -> None:
    tight = int(16 * GIB)
    found = cures(replace(REFERENCE, swapped=0), BATCHES, tight, CARD)
    times = [total_seconds(outlook, BATCHES, tight, CARD) for outlook in found.values()]
    assert len(found) == 2 and times == sorted(times)
    choice = best_swapped(REFERENCE, BATCHES, tight, CARD)
    assert choice is not None and f"--blocks_to_swap {choice.number}" in found
    assert all(fits(outlook, LOADS, tight) for outlook in found.values())
