"""How a run is set up decides what it holds; other settings are tried until they fit."""

from dataclasses import replace

import pytest
import torch

from tests.unit.memory.adapters import adapter_parameters
from wanlora.memory.cards import CARDS
from wanlora.memory.checkpointing import Kept
from wanlora.memory.footprint import BlockMaths, attention_per_token
from wanlora.memory.outlook import Load, Outlook, cures, fewest_swapped, fits
from wanlora.memory.resting import WeightFormats, block_weights
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
    found = cures(heavy, LOADS, room)
    assert all(fits(outlook, LOADS, room) for outlook in found.values())
    assert next(iter(found)) == "--fp8_base --fp8_scaled --gradient_checkpointing --gradient_checkpointing_cpu_offload"
    more = "--fp8_base --fp8_scaled --gradient_checkpointing --blocks_to_swap "
    assert any(flags.startswith(more) for flags in found) and "--gradient_checkpointing --blocks_to_swap 20" in found
    for flags, outlook in found.items():
        assert ("fp8" in flags) == outlook.maths.fp8
        assert ("--gradient_checkpointing" in flags) == outlook.recompute
    assert cures(REFERENCE, LOADS, 3 * GIB) == {}


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
    assert kept == Kept(0, attention=int(spare // each) + 1)  # the last one is recomputed while all hold theirs
    whole = REFERENCE.most_kept(LARGEST, room + 10 * GIB)
    assert whole.blocks > 0 and whole.blocks + whole.attention == 40
    assert REFERENCE.most_kept(LOADS[1], 200 * GIB) == Kept(40)
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


def test_transposed_weights_take_what_the_matrices_take_unless_blocks_are_swapped() -> None:
    resident = replace(REFERENCE, swapped=0, fp8_products=True, formats=replace(REFERENCE.formats, scales="rows"))
    both = replace(resident, transposed=True)
    more = both.peak(LARGEST) - resident.peak(LARGEST)
    assert more == both.resting()["transposed weights"] == both.transposed_bytes
    assert more / GIB == pytest.approx(13.0, abs=0.1)
    assert replace(both, swapped=1).resting() == replace(resident, swapped=1).resting()


def test_doing_without_transposed_weights_is_the_first_cure() -> None:
    both = replace(REFERENCE, swapped=0, transposed=True)
    room = both.peak(LARGEST) - 1
    assert next(iter(cures(both, LOADS, room))) == "--fp8_fast_transposed off"
    found = cures(both, LOADS, int(15.6 * GIB))
    assert found and all(flags.startswith("--fp8_fast_transposed off --") for flags in found)
    assert all(fits(outlook, LOADS, int(15.6 * GIB)) and not outlook.transposed for outlook in found.values())


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
    starved = replace(REFERENCE, swapped=38)
    copies = 2 * 38 * BLOCK / 25e9
    assert starved.seconds(LOADS[1], card, kept=Kept()) == pytest.approx(
        max(copies, REFERENCE.seconds(LOADS[1], card, kept=Kept()))
    )
