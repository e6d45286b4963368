"""Settings are tried until they fit, and the fastest of those that fit are taken."""

from dataclasses import replace

import pytest

from tests.unit.memory.test_outlook import BLOCK, GIB, LARGEST, LOADS, REFERENCE
from wanlora.memory.cards import CARDS
from wanlora.memory.checkpointing import Kept
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
    together = replace(REFERENCE, accumulates=True)
    choice = best_swapped(together, BATCHES, ROOM, CARD)
    assert choice is not None and choice.number > choice.fewest + 10
    times = [total_seconds(replace(together, swapped=n), BATCHES, ROOM, CARD) for n in range(39)]
    possible = times[choice.fewest :]
    assert times[choice.number] * (1 - WORTH) <= min(possible)
    assert all(taken * (1 - WORTH) > min(possible) for taken in times[choice.fewest : choice.number])
    assert choice.gain == pytest.approx(1 - times[choice.number] / times[choice.fewest]) and choice.gain > 0.1


def test_sizes_have_the_numbers_with_which_the_data_takes_less_time_than_with_any_for_all() -> None:
    for card, room, fast in (("H100", 22.3, False), ("H100", 22.3, True), ("RTX 4090", 21.6, True)):
        outlook = replace(REFERENCE, swapped=0, fp8_products=fast)
        room = int(room * GIB)
        choice = best_swapped(outlook, BATCHES, room, CARDS[card])
        assert choice is not None and choice.by_size.keys() == BATCHES.keys()
        numbers = [choice.by_size[load] for load in sorted(BATCHES, key=lambda load: load.tokens)]
        assert numbers == sorted(numbers[:3]) + numbers[3:] and numbers[0] <= 7 and choice.number == max(numbers) > 15
        chosen = choice.applied(outlook)
        assert fits(chosen, LOADS, room)
        assert not fits(replace(outlook, swapped=choice.fewest - 1), LOADS, room)
        alike = [total_seconds(replace(outlook, swapped=n), BATCHES, room, CARDS[card]) for n in range(39)]
        least = min(alike[choice.fewest :])
        assert choice.alike is not None and alike[choice.alike] == least
        taken = total_seconds(chosen, BATCHES, room, CARDS[card])
        assert choice.gain == pytest.approx(1 - taken / least) and choice.gain > 0.01
        for load, number in choice.by_size.items():  # none is better off on its own
            others = [replace(chosen, by_size={**choice.by_size, load: n}) for n in (number - 5, number + 5) if n >= 0]
            for other in others:
                assert not fits(other, LOADS, room) or total_seconds(other, BATCHES, room, CARDS[card]) > 0.998 * taken


def test_what_a_large_size_drives_off_is_copied_again_for_the_next() -> None:
    small, large = LOADS[1], LOADS[0]
    outlook = replace(REFERENCE, swapped=38, by_size={small: 0, large: 38})
    card, half = replace(CARD, link=6.0), {small: 1, large: 1}
    kept = {load: outlook.most_kept(load, ROOM) for load in half}
    left = {load: outlook.buffers_left(load, kept[load]) for load in half}
    assert left[small] == 40 and 2 < left[large] < 40  # what backward frees is not enough for all
    times = {load: outlook.seconds(small, card, kept=kept[small], before=left[load]) for load in half}
    assert times[large] > times[small]
    there = outlook.seconds(large, card, kept=kept[large])
    assert total_seconds(outlook, half, ROOM, card) == pytest.approx(sum(times.values()) / 2 + there)


def test_behind_a_backward_that_frees_much_a_small_batch_takes_no_longer() -> None:
    small, large = LOADS[1], LARGEST
    outlook = replace(REFERENCE, swapped=10, by_size={small: 0, large: 10})
    kept = Kept(10, 10)
    assert outlook.buffers(large) == 2 and outlook.buffers_left(large, kept) == outlook.buffers_left(small, kept) == 12
    taken = [outlook.seconds(small, CARD, kept=Kept(40), before=before) for before in (12, None)]
    assert taken[0] == taken[1]
    alone = replace(outlook, by_size={large: 10})
    assert alone.buffers_left(large, kept) == 2
    slow = replace(CARD, link=1.0)  # copies for others come on top of its own
    assert outlook.seconds(large, slow, kept=kept, before=2) > alone.seconds(large, slow, kept=kept)
    assert outlook.seconds(large, slow, kept=kept) < outlook.seconds(large, slow, kept=kept, before=2)


def test_forward_finds_blocks_in_buffers_that_it_gives_back() -> None:
    small, large = LOADS[1], LARGEST
    outlook = replace(REFERENCE, swapped=30, by_size={small: 0, large: 30})
    kept = Kept(20, 20)
    assert outlook.buffers(large) == 2 and outlook.buffers(small) == 32
    assert [outlook.buffers_found(large, kept, before) for before in (2, 10, 32)] == [2, 10, 32]
    assert outlook.buffers_found(small, Kept(40), 10) == 10
    little = Load(tokens=16)  # what it needs has no room for a buffer
    assert outlook.buffers_found(little, Kept(40), 32) <= outlook.buffers(little) + 1 == 3


def test_a_size_swaps_no_more_than_is_worth_it_and_sizes_are_alike_where_that_is_as_good() -> None:
    choice = best_swapped(REFERENCE, BATCHES, ROOM, CARD)
    assert choice is not None and choice.by_size[LOADS[1]] < choice.by_size[LARGEST]
    assert replace(REFERENCE, swapped=choice.number).most_kept(LOADS[1], ROOM).blocks == 40
    one = best_swapped(REFERENCE, {LARGEST: 100}, ROOM, CARD)
    assert one is not None and one.by_size == {} and one.alike is None
    together = best_swapped(replace(REFERENCE, accumulates=True), BATCHES, ROOM, CARD)
    assert together is not None and together.by_size == {}
    tight = best_swapped(replace(REFERENCE, swapped=0), BATCHES, int(13.9 * GIB), CARDS["RTX 4080"])
    assert tight is not None and tight.by_size == {}


def test_what_waits_on_the_host_for_any_size_is_bounded_by_its_memory_and_previews_by_the_smallest_ring() -> None:
    card, room = CARDS["H100"], int(22.3 * GIB)
    best, bounded = (best_swapped(REFERENCE, BATCHES, room, card, host=host) for host in (None, 22 * BLOCK))
    assert best is not None and bounded is not None and bounded.by_size and bounded.number <= 20 < best.number
    assert host_bytes(bounded.applied(REFERENCE), BATCHES) <= 22 * BLOCK
    besides = ROOM - sum(replace(REFERENCE, swapped=30).resting().values())
    choice = best_swapped(REFERENCE, BATCHES, ROOM, CARDS["H100"], besides=besides)
    assert choice is not None and choice.by_size and choice.fewest == 30 <= choice.number
    assert min(choice.by_size.values()) < 20 and fits(choice.applied(REFERENCE), BATCHES, ROOM, besides=besides)


def test_blocks_of_plain_autograd_wait_on_the_host_for_all_sizes_or_none() -> None:
    eager = replace(REFERENCE, maths=replace(REFERENCE.maths, compiled=False), swapped=0)
    card, room = replace(CARDS["H100"], link=12.5), 16 * GIB
    choice = best_swapped(eager, BATCHES, room, card)
    assert choice is not None and choice.number == choice.alike
    assert choice.by_size[LARGEST] == choice.number > max(choice.by_size[load] for load in LOADS if load != LARGEST)
    assert choice.gain > 0.1


def test_no_more_are_swapped_than_suffice_where_little_is_gained() -> None:
    small = {Load(tokens=256): 100}
    assert best_swapped(REFERENCE, small, ROOM, CARD) == Swapping(number=0, fewest=0)
    assert best_swapped(REFERENCE, BATCHES, 75 * GIB, CARDS["H100"]) == Swapping(number=0, fewest=0)
    whole = replace(REFERENCE, recompute=False)  # what blocks keep is decided before memory is looked at
    fewest = fewest_swapped(whole, LOADS, 50 * GIB)
    assert fewest and best_swapped(whole, BATCHES, 50 * GIB, CARD) == Swapping(number=fewest, fewest=fewest)


def test_copies_that_no_computation_hides_are_not_worth_it() -> None:
    choice = best_swapped(replace(REFERENCE, accumulates=True), BATCHES, ROOM, replace(CARD, link=1.0))
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
    few = replace(REFERENCE, swapped=choice.fewest)
    found = faster(few, BATCHES, ROOM, CARD)
    assert next(iter(found)) == "--blocks_to_swap auto"
    now, then = (total_seconds(one, BATCHES, ROOM, CARD) for one in (few, choice.applied(REFERENCE)))
    assert found["--blocks_to_swap auto"] == pytest.approx(1 - then / now)
    assert faster(choice.applied(REFERENCE), BATCHES, ROOM, CARD) == {}
    together = replace(few, accumulates=True)
    one = best_swapped(together, BATCHES, ROOM, CARD)
    assert one is not None
    found = faster(replace(together, swapped=one.fewest), BATCHES, ROOM, CARD)
    assert found[f"--blocks_to_swap {one.number}"] == pytest.approx(one.gain)
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
    assert choice is not None and found["--blocks_to_swap auto"].by_size == choice.by_size != {}
    assert all(fits(outlook, LOADS, tight) for outlook in found.values())
