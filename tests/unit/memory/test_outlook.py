"""How a run is set up decides what it holds and how long it takes."""

from dataclasses import replace

import pytest
import torch

from tests.unit.memory.adapters import adapter_parameters
from wanlora.memory.cards import CARDS, work_seconds
from wanlora.memory.checkpointing import Kept
from wanlora.memory.footprint import BlockMaths, attention_per_token
from wanlora.memory.outlook import Load, Outlook
from wanlora.memory.resting import WeightFormats, block_weights
from wanlora.memory.work import block_work
from wanlora.models.wan.spec import TASKS

GIB = 2**30
SIZES = TASKS["t2v-14B"].sizes
LOADS = [Load(tokens=tokens) for tokens in (2304, 1248, 7488, 3744)]
LARGEST = LOADS[2]
REFERENCE = Outlook(
    maths=BlockMaths(sizes=SIZES, fp8=True, rank=32),
    formats=WeightFormats(compute=torch.bfloat16, fp8=True),
    trained=40 * adapter_parameters(SIZES, 32),
    state_bytes=2.03,
    swapped=10,
)
BLOCK = block_weights(SIZES, REFERENCE.formats)


def test_the_reference_run_needs_what_it_was_measured_to_need() -> None:
    whole = Kept(0, everything=True)
    assert REFERENCE.peak(LARGEST, whole) / GIB == pytest.approx(19.57, rel=0.02)
    assert replace(REFERENCE, swapped=0).peak(LARGEST, whole) / GIB == pytest.approx(23.06, rel=0.02)


def test_the_parts_are_the_whole() -> None:
    parts = REFERENCE.resting() | REFERENCE.step(LARGEST)
    assert sum(parts.values()) == REFERENCE.peak(LARGEST)


def test_a_swapped_block_frees_its_weights_and_takes_system_memory() -> None:
    fewer = replace(REFERENCE, swapped=9)
    assert fewer.peak(LARGEST) - REFERENCE.peak(LARGEST) == BLOCK
    assert REFERENCE.host == 12 * BLOCK
    assert replace(REFERENCE, swapped=0).host == 0
    assert replace(REFERENCE, swapped=40).streamed == 40


def test_sizes_with_fewer_swapped_blocks_have_the_others_in_buffers() -> None:
    small, large = LOADS[1], LARGEST
    sized = replace(REFERENCE, swapped=30, by_size={small: 0, large: 30, LOADS[0]: 12})
    assert (sized.streamed, sized.host) == (32, 32 * BLOCK)
    assert [sized.buffers(load) for load in (small, large, LOADS[0], LOADS[3])] == [32, 2, 20, 2]
    assert sized.buffers() == 2 and sized.resting() == replace(REFERENCE, swapped=30).resting()
    for load, number in sized.by_size.items():
        alone = replace(REFERENCE, swapped=number)
        assert sized.peak(load) == alone.peak(load)
        assert sized.most_kept(load, 20 * GIB) == alone.most_kept(load, 20 * GIB)
        for card in (CARDS["RTX 4090"], CARDS["RTX 3060"]):
            assert sized.seconds(load, card, kept=Kept(9)) == alone.seconds(load, card, kept=Kept(9))


def test_the_last_batch_of_an_epoch_has_the_number_of_whole_ones() -> None:
    numbers = {Load(tokens=64, batch=4): 7, Load(tokens=64, batch=2): 3, Load(tokens=32, batch=9): 1}
    sized = replace(REFERENCE, swapped=10, by_size=numbers)
    found = [sized.swapped_for(Load(tokens=64, batch=batch)) for batch in (1, 2, 3, 4, 5)]
    assert found == [3, 3, 7, 7, 10] and sized.swapped_for(Load(tokens=65)) == 10


def test_keeping_inputs_on_the_host_leaves_two_on_the_card() -> None:
    away = replace(REFERENCE, offload=True)
    inputs = 38 * 7488 * 5120 * 4
    assert REFERENCE.peak(LARGEST) - away.peak(LARGEST) == pytest.approx(inputs, rel=1e-6)
    assert away.offloaded(LARGEST) == 40 * 7488 * 5120 * 4
    assert REFERENCE.offloaded(LARGEST) == 0


def test_blocks_are_kept_as_room_allows() -> None:
    room = 24 * GIB
    kept = REFERENCE.most_kept(LARGEST, room)
    spare = room - REFERENCE.peak(LARGEST)
    each = LARGEST.tokens * attention_per_token(REFERENCE.maths)
    # The last one is recomputed while all hold theirs; in its place one block can keep products.
    assert kept == Kept(1, attention=int(spare // each))
    whole = REFERENCE.most_kept(LARGEST, room + 10 * GIB)
    assert whole.blocks > 0 and whole.blocks + whole.attention >= 39  # products may be worth one recomputed block
    assert REFERENCE.most_kept(LOADS[1], 200 * GIB) == Kept(40, everything=True)
    assert REFERENCE.most_kept(LOADS[1], REFERENCE.peak(LOADS[1], Kept(40))) == Kept(40)
    assert REFERENCE.most_kept(LARGEST, 10 * GIB) == Kept()
    eager = replace(REFERENCE, maths=replace(REFERENCE.maths, compiled=False))
    assert eager.most_kept(LOADS[1], 200 * GIB) == Kept(28)
    assert not eager.most_kept(LARGEST, 30 * GIB).attention


def test_nothing_recomputed_needs_every_activation() -> None:
    everything = replace(REFERENCE, recompute=False, swapped=0)
    assert everything.kept == Kept(40)
    assert everything.peak(LARGEST) > 50 * GIB
    assert replace(everything, swapped=10).kept == Kept(40)
    eager = replace(everything, maths=replace(everything.maths, compiled=False))
    assert replace(eager, swapped=10).kept == Kept(28)


def test_an_optimizer_that_remembers_much_computes_much() -> None:
    tiny = Load(tokens=16)
    adam, light = replace(REFERENCE, state_bytes=8.0), REFERENCE
    more = (8 - 2.03) * REFERENCE.trained
    assert adam.peak(tiny) - light.peak(tiny) == pytest.approx(more + 4 * REFERENCE.trained, rel=0.5)


def test_copies_before_an_update_count_where_a_pass_needs_less() -> None:
    tiny, copied = Load(tokens=16), replace(REFERENCE, copied=True)
    assert copied.peak(tiny) - sum(copied.resting().values()) == round((4 + 4 + 2.03) * REFERENCE.trained)
    assert copied.peak(LARGEST) == REFERENCE.peak(LARGEST)


def test_copies_of_the_factors_are_always_there() -> None:
    for outlook in (REFERENCE, replace(REFERENCE, accumulates=True)):
        narrow = replace(outlook, maths=replace(REFERENCE.maths, narrow=True))
        assert narrow.resting()["LoRA"] == outlook.resting()["LoRA"] + 2 * REFERENCE.trained
        assert narrow.peak(LARGEST) == outlook.peak(LARGEST) + 2 * REFERENCE.trained


def test_gradients_that_are_widened_count_where_a_pass_needs_less() -> None:
    tiny, narrow = Load(tokens=16), replace(REFERENCE, maths=replace(REFERENCE.maths, narrow=True))
    for outlook, each in ((narrow, 2 + 4), (replace(narrow, accumulates=True), 2 + 4 + 4)):
        assert outlook.peak(tiny) - sum(outlook.resting().values()) == each * REFERENCE.trained


def test_transposed_weights_take_what_the_matrices_take_unless_blocks_are_swapped() -> None:
    resident = replace(REFERENCE, swapped=0, fp8_products=True, formats=replace(REFERENCE.formats, scales="rows"))
    both = replace(resident, transposed=True)
    more = both.peak(LARGEST) - resident.peak(LARGEST)
    assert more == both.resting()["transposed weights"] == both.transposed_bytes
    assert more / GIB == pytest.approx(13.0, abs=0.1)
    assert replace(both, swapped=1).resting() == replace(resident, swapped=1).resting()


def test_a_step_takes_longer_with_less() -> None:
    card = CARDS["RTX 4090"]
    seconds = REFERENCE.seconds(LARGEST, card, kept=Kept())
    assert REFERENCE.seconds(LARGEST, card, kept=Kept(20)) < seconds
    assert REFERENCE.seconds(LARGEST, card, kept=Kept(0, attention=40)) < seconds
    eager = replace(REFERENCE, maths=replace(REFERENCE.maths, compiled=False))
    assert eager.seconds(LARGEST, card, kept=Kept()) > seconds
    fast = replace(REFERENCE, fp8_products=True, swapped=0)
    assert fast.seconds(LARGEST, card, kept=Kept()) < seconds
    assert replace(fast, transposed=True).seconds(LARGEST, card, kept=Kept()) < fast.seconds(LARGEST, card, kept=Kept())


def test_copies_take_their_time_where_a_block_is_computed_sooner() -> None:
    card, small = CARDS["RTX 4090"], LOADS[1]
    for load, kept in ((small, Kept(40)), (LARGEST, Kept())):
        resident = replace(REFERENCE, swapped=0)
        forward, backward = (
            40 * work_seconds(card, work)
            for work in block_work(resident.maths, load.tokens, saved="products" if kept.blocks else "nothing")
        )
        assert resident.seconds(load, card, kept=kept) == pytest.approx(forward + backward)
        copies = 38 * BLOCK / 25e9
        expected = max(forward, copies) + max(backward, copies)
        assert replace(REFERENCE, swapped=38).seconds(load, card, kept=kept) == pytest.approx(expected)
    assert forward > copies  # a large size hides them, forward of a small one does not
    assert replace(REFERENCE, swapped=38).seconds(small, card, kept=Kept(40)) > REFERENCE.seconds(
        small, card, kept=Kept(40)
    )


def test_inputs_that_are_kept_on_the_host_are_copied_too() -> None:
    slow = replace(CARDS["RTX 4090"], link=0.5)
    away = replace(REFERENCE, swapped=0, offload=True)
    there = replace(away, offload=False)
    assert away.seconds(LARGEST, slow, kept=Kept()) > there.seconds(LARGEST, slow, kept=Kept())
    assert away.seconds(LARGEST, slow, kept=Kept(40)) == there.seconds(LARGEST, slow, kept=Kept(40))
    copies = 40 * 7488 * 5120 * 4 / 0.5e9
    assert away.seconds(LARGEST, slow, kept=Kept()) == pytest.approx(2 * copies, rel=0.01)
