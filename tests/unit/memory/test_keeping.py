"""How many blocks are kept, in a world where what a pass needs is known."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from wanlora.foundation.log import log
from wanlora.memory.checkpointing import Kept
from wanlora.memory.keeping import Keeping
from wanlora.memory.mixing import time_spared

MIB = 2**20
NUM_BLOCKS = 40
WIDTH = 256


@dataclass
class World:
    """A card on which weights rest and a pass needs a workspace, its inputs, and what blocks keep: bytes a token."""

    rest: int = 1000 * MIB
    workspace_a_token: int = 12 * WIDTH
    kept_a_token: int = 40 * WIDTH
    loss_a_token: int = 0
    """Of the turn from forward to backward."""
    attention_a_token: int = 5 * WIDTH
    attention_workspace_a_token: int = 14 * WIDTH
    """Of a backward that begins at attention."""
    now_peak: int = 0
    num_retries: int = 0

    def allocated(self) -> int:
        return self.rest

    def peak(self) -> int:
        return self.now_peak

    def reset(self) -> None:
        self.now_peak = self.rest

    def take_highest(self) -> int:
        return self.now_peak

    def retries(self) -> int:
        return self.num_retries

    def free(self) -> int:
        return 0

    def need(self, x: Tensor, kept: int, *, attention: int = 0, everything: bool = False) -> int:
        tokens, input_bytes = x.shape[1], x.numel() * 4
        each = int(self.kept_a_token * (1.9 if everything else 1))
        inputs = (NUM_BLOCKS - kept) * input_bytes + attention * self.attention_a_token * tokens
        at_the_turn = (kept * each + self.loss_a_token) * tokens + inputs
        recomputing = inputs + each * tokens if kept < NUM_BLOCKS else 0
        workspace = self.workspace_a_token + (self.attention_workspace_a_token if attention else 0)
        return workspace * tokens + max(at_the_turn, recomputing)

    def most(self, x: Tensor, limit: int, *, attention: int = 0) -> int:
        """The most blocks whose need stays below the limit while `attention` of all keep that at least."""
        return self._most(limit, lambda k: self.need(x, k, attention=max(attention - k, 0)))

    def most_attention(self, x: Tensor, limit: int) -> int:
        """The most blocks that can keep attention."""
        return self._most(limit, lambda k: self.need(x, 0, attention=k))

    def _most(self, limit: int, need: Callable[[int], int]) -> int:
        return max((k for k in range(NUM_BLOCKS + 1) if self.rest + need(k) <= limit), default=0)


def stream(tokens: int) -> Tensor:
    return torch.empty(1, tokens, WIDTH, device="meta")


SMALL, LARGE = stream(1000), stream(8000)


def keeping(
    world: World,
    limit: int,
    *,
    activations: int | None = None,
    everything: bool = False,
    attention: int = 0,
    ample: bool = True,
) -> Keeping:
    return Keeping(
        NUM_BLOCKS,
        NUM_BLOCKS,
        meter=world,
        limit=limit,
        activations=activations,
        everything=everything,
        ample=ample,
        attention=attention,
    )


def one_pass(made: Keeping, world: World, x: Tensor, label: str = "size") -> int:
    """The number of blocks kept in a pass."""
    return whole_pass(made, world, x, label).blocks


def whole_pass(made: Keeping, world: World, x: Tensor, label: str = "size") -> Kept:
    """What is kept in a pass."""
    with made.step(), made.batch(label):
        kept = made(x)
        assert all(made(x) == kept for _ in range(3))
        world.now_peak = max(
            world.now_peak, world.rest + world.need(x, *kept[:1], attention=kept.attention, everything=kept.everything)
        )
    return kept


@pytest.mark.parametrize("room", [0.05, 0.3, 0.5])
def test_attention_is_kept_before_blocks_are_where_not_all_of_them_fit(room: float) -> None:
    world = World()
    limit = world.rest + int(world.need(LARGE, 0) + room * (world.need(LARGE, NUM_BLOCKS) - world.need(LARGE, 0)))
    made = keeping(world, limit, attention=world.attention_a_token)
    kept = [whole_pass(made, world, LARGE) for _ in range(8)]
    attention = world.most_attention(LARGE, limit)
    most = world.most(LARGE, limit, attention=NUM_BLOCKS) if attention == NUM_BLOCKS else 0
    assert kept[0] == Kept() and attention - 4 <= kept[1].attention + kept[1].blocks <= attention
    assert kept[2].attention + kept[2].blocks == attention
    assert all(one.blocks <= most for one in kept) and kept[-1] == Kept(most, attention - most)
    assert attention > 0 and most < NUM_BLOCKS


def test_attention_is_not_tried_before_blocks_where_nearly_all_of_them_can_be_kept() -> None:
    world = World()
    limit = world.rest + world.need(LARGE, NUM_BLOCKS - 3)
    nearly = keeping(world, limit, attention=world.attention_a_token)
    kept = [whole_pass(nearly, world, LARGE) for _ in range(8)]
    first = next(place for place, one in enumerate(kept) if one.attention)
    assert kept[first - 1].blocks >= world.most(LARGE, limit) - 1
    ample = keeping(world, 2**40, attention=world.attention_a_token)
    assert [whole_pass(ample, world, SMALL) for _ in range(2)] == [Kept(), Kept(NUM_BLOCKS)]


@pytest.mark.parametrize("blocks", range(3, 30))
def test_a_backward_that_begins_at_attention_has_room_the_first_time(blocks: int) -> None:
    world = World()
    limit = world.rest + world.need(LARGE, 0, attention=blocks)
    made = keeping(world, limit, attention=world.attention_a_token)
    kept = []
    for _ in range(5):
        kept.append(whole_pass(made, world, LARGE))
        assert world.now_peak <= limit
    assert kept[-1].attention == blocks


@pytest.mark.parametrize("blocks", [22, 25, 31, 35, 37, 38, 39])
@pytest.mark.parametrize("left", [0.0, 0.4, 0.9])
@pytest.mark.parametrize("loss", [0, 20 * WIDTH])
def test_blocks_that_do_not_fit_keep_attention_if_that_spares_more_and_none_is_above_the_limit(
    blocks: int, left: float, loss: int
) -> None:
    world = World(loss_a_token=loss)
    each = (world.kept_a_token - 4 * WIDTH) * LARGE.shape[1]
    limit = world.rest + world.need(LARGE, blocks) + int(left * each)
    made = keeping(world, limit, attention=world.attention_a_token)
    kept, peaks = [], []
    for _ in range(12):
        kept.append(whole_pass(made, world, LARGE))
        peaks.append(world.now_peak)
    assert max(peaks) <= limit and len(set(kept[-3:])) == 1
    best = max(spared(world, blocks), spared(world, *upgraded(world, LARGE, limit)))
    assert spared(world, *kept[-1][:2]) >= 0.975 * best
    assert spared(world, *kept[-1][:2]) >= spared(world, max(one.blocks for one in kept))


def spared(world: World, blocks: int, attention: int = 0) -> float:
    held = 4 * WIDTH
    return time_spared(
        blocks, attention, products_bytes=world.kept_a_token - held, attention_bytes=world.attention_a_token
    )


def upgraded(world: World, x: Tensor, limit: int) -> tuple[int, int]:
    """Attention in all blocks, and products in as many as fit."""
    most = world.most(x, limit, attention=NUM_BLOCKS)
    return most, NUM_BLOCKS - most


def test_attention_that_turns_out_not_to_fit_is_taken_back_for_good() -> None:
    world = World()
    each = world.attention_a_token * LARGE.shape[1]
    limit = world.rest + world.need(LARGE, 0, attention=20) + each // 2
    made = keeping(world, limit, attention=world.attention_a_token)
    assert [whole_pass(made, world, LARGE).attention for _ in range(3)] == [0, 19, 20]
    world.rest += 2 * each
    assert whole_pass(made, world, LARGE).attention == 18
    world.rest -= 2 * each
    assert {whole_pass(made, world, LARGE).attention for _ in range(3)} == {18}
    assert made.give_up() == Kept(0, attention=18)
    made.limit = limit
    assert [whole_pass(made, world, LARGE).attention for _ in range(3)] == [0, 17, 17]


def test_blocks_hold_everything_where_twice_as_much_fits_and_go_back_if_it_does_not() -> None:
    world = World()
    limit = world.rest + 2 * world.need(SMALL, NUM_BLOCKS) + MIB
    made = keeping(world, limit, attention=world.attention_a_token)
    kept = [whole_pass(made, world, SMALL) for _ in range(6)]
    assert kept[0] == Kept() and kept[-1] == Kept(NUM_BLOCKS, everything=True)
    assert sorted(kept) == kept
    world.rest += world.need(SMALL, NUM_BLOCKS) // 2
    assert [whole_pass(made, world, SMALL) for _ in range(3)] == [Kept(NUM_BLOCKS)] * 3
    for never in (keeping(World(), limit), keeping(World(), limit, attention=world.attention_a_token, ample=False)):
        assert [whole_pass(never, World(), SMALL) for _ in range(6)][-3:] == [Kept(NUM_BLOCKS)] * 3


@pytest.mark.parametrize("gib", [1.5, 2.0, 3.0, 4.5])
def test_three_passes_find_nearly_the_most_that_fits_and_none_is_above_the_limit(gib: float) -> None:
    limit = int(gib * 1024 * MIB)
    for x in (SMALL, LARGE):
        world = World()
        made = keeping(world, limit)
        most = world.most(x, limit)
        kept = [one_pass(made, world, x) for _ in range(8)]
        assert kept[0] == 0 and kept == sorted(kept)
        assert all(count <= most for count in kept)
        assert kept[2] >= most - 1
        assert kept[-1] == most


def test_a_loss_that_takes_as_much_as_blocks_do_is_not_taken_for_what_blocks_keep() -> None:
    world = World(workspace_a_token=0, loss_a_token=100 * WIDTH)
    limit = world.rest + world.need(LARGE, 4)
    made = keeping(world, limit)
    kept = [one_pass(made, world, LARGE) for _ in range(6)]
    assert kept[0] == 0 and all(count <= 4 for count in kept)
    assert kept[-1] >= 2  # the first block that is kept looks as if it took as much as three


def test_each_size_has_its_own_number() -> None:
    world = World()
    made = keeping(world, 2048 * MIB)
    for _ in range(5):
        small, large = one_pass(made, world, SMALL), one_pass(made, world, LARGE)
    assert small == NUM_BLOCKS and 0 < large < NUM_BLOCKS


def test_activations_may_be_given_a_share_and_none_of_it_means_that_everything_is_recomputed() -> None:
    world = World()
    share = world.need(LARGE, 10)
    made = keeping(world, 2**40, activations=share)
    assert max(one_pass(made, world, LARGE) for _ in range(6)) in (9, 10)
    made = keeping(world, 2**40, activations=0)
    assert {one_pass(made, world, LARGE) for _ in range(4)} == {0}


def test_memory_that_something_else_has_taken_takes_blocks_back() -> None:
    world = World()
    limit = 2048 * MIB
    made = keeping(world, limit)
    before = [one_pass(made, world, LARGE) for _ in range(6)][-1]
    world.rest += 200 * MIB
    after = [one_pass(made, world, LARGE) for _ in range(3)][-1]
    assert 0 < after < before and after <= world.most(LARGE, limit)


def test_more_is_not_tried_again_after_blocks_were_taken_back_twice() -> None:
    world = World()
    made = keeping(world, 2048 * MIB)
    lowest = NUM_BLOCKS
    for extra in (100 * MIB, 200 * MIB):
        for _ in range(6):
            one_pass(made, world, LARGE)
        world.rest += extra
        lowest = one_pass(made, world, LARGE)
        world.rest -= extra
    assert {one_pass(made, world, LARGE) for _ in range(5)} == {lowest}


def a_pass_that_rearranges(made: Keeping, world: World, times: int = 1) -> None:
    with made.step(), made.batch("size"):
        made(LARGE)
        world.now_peak, world.num_retries = world.rest + world.need(LARGE, made.kept.blocks), world.num_retries + times


def test_a_size_for_which_memory_is_rearranged_again_and_again_leaves_more_of_it_but_not_without_end() -> None:
    world = World()
    limit = 2048 * MIB
    made = keeping(world, limit)
    for _ in range(60):
        a_pass_that_rearranges(made, world)
    lowest = world.most(LARGE, int(0.85 * limit))
    assert 0 < made.kept.blocks == lowest < world.most(LARGE, limit)
    for _ in range(5):
        small = one_pass(made, world, SMALL)
    assert small == world.most(SMALL, limit)  # others leave no more than before


def test_a_size_that_keeps_only_attention_leaves_more_of_memory_that_is_rearranged() -> None:
    world = World()
    limit = int(world.rest + world.need(LARGE, 0) + 0.3 * (world.need(LARGE, 0, attention=NUM_BLOCKS)))
    made = keeping(world, limit, attention=world.attention_a_token)
    for _ in range(6):
        before = whole_pass(made, world, LARGE)
    assert before.blocks == 0 < before.attention < NUM_BLOCKS
    for _ in range(30):
        with made.step(), made.batch("size"):
            after = made(LARGE)
            world.now_peak = world.rest + world.need(LARGE, 0, attention=after.attention)
            world.num_retries += 1
    assert after.blocks == 0 and after.attention < before.attention


def test_memory_that_is_rearranged_now_and_then_changes_nothing_and_three_times_in_a_pass_does() -> None:
    world = World()
    limit = 2048 * MIB
    made = keeping(world, limit)
    for _ in range(20):
        a_pass_that_rearranges(made, world)
        for _ in range(4):
            one_pass(made, world, LARGE)
    assert made.kept.blocks == world.most(LARGE, limit)
    a_pass_that_rearranges(made, world, times=3)
    for _ in range(5):
        one_pass(made, world, LARGE)
    assert made.kept.blocks == world.most(LARGE, int(0.98 * limit)) < world.most(LARGE, limit)


def test_after_memory_ran_out_the_size_is_recomputed_and_all_go_on_below_that_peak() -> None:
    world = World()
    limit = 2048 * MIB
    made = keeping(world, limit)
    for _ in range(5):
        one_pass(made, world, SMALL)
        before = one_pass(made, world, LARGE)
    peak = world.rest + world.need(LARGE, before) - 50 * MIB
    with pytest.raises(MemoryError), made.step(), made.batch("size"):
        made(LARGE)
        world.now_peak = peak
        raise MemoryError
    assert made.give_up().blocks == before
    assert made.limit == int(0.95 * peak)
    assert one_pass(made, world, LARGE) == 0
    assert made.give_up() == Kept()
    after = [one_pass(made, world, LARGE) for _ in range(5)]
    assert 0 < after[-1] < before and all(count <= world.most(LARGE, made.limit) for count in after)
    assert one_pass(made, world, SMALL) <= world.most(SMALL, made.limit)


def test_everything_is_kept_until_memory_runs_out_and_smaller_sizes_go_on_so() -> None:
    made = Keeping(NUM_BLOCKS, NUM_BLOCKS, everything=True)
    assert made(LARGE) == Kept(NUM_BLOCKS)  # also outside of a step
    with made.step(), made.batch("size"):
        assert made(SMALL) == Kept(NUM_BLOCKS)
    with made.step(), made.batch("size"):
        assert made(LARGE) == Kept(NUM_BLOCKS)
    assert made.give_up() == Kept(NUM_BLOCKS)
    for x, expected in ((LARGE, 0), (stream(9000), 0), (SMALL, NUM_BLOCKS)):
        with made.step(), made.batch("size"):
            assert made(x) == Kept(expected)


def test_with_a_meter_blocks_are_chosen_once_everything_has_failed() -> None:
    world = World()
    made = keeping(world, 2048 * MIB, everything=True)
    assert one_pass(made, world, LARGE) == NUM_BLOCKS
    made.give_up()
    kept = [one_pass(made, world, LARGE) for _ in range(5)]
    assert kept[0] == 0 < kept[-1] <= world.most(LARGE, made.limit)


def test_nothing_is_kept_where_nothing_is_measured_and_outside_of_a_step() -> None:
    made = Keeping(NUM_BLOCKS, NUM_BLOCKS)
    with made.step(), made.batch("size"):
        assert made(SMALL) == Kept()
    world = World()
    made = keeping(world, 2**40)
    for _ in range(3):
        one_pass(made, world, SMALL)
    assert made.kept.blocks == NUM_BLOCKS and made(SMALL) == Kept()


def test_what_a_block_needs_beside_attention_says_nothing_of_what_it_needs_without() -> None:
    world = World(workspace_a_token=36 * WIDTH, kept_a_token=18 * WIDTH, attention_a_token=4 * WIDTH)
    limit = world.rest + int(1.2 * world.need(LARGE, NUM_BLOCKS))
    made = keeping(world, limit, attention=world.attention_a_token)
    before = [whole_pass(made, world, LARGE) for _ in range(6)]
    assert any(kept.attention for kept in before) and before[-1].blocks == NUM_BLOCKS
    made.give_up()
    made.limit = world.rest + world.need(LARGE, 35)
    after = [whole_pass(made, world, LARGE) for _ in range(6)]
    assert after[0] == Kept() != after[-1]
    assert all(kept.blocks <= world.most(LARGE, made.limit, attention=kept.attention) for kept in after)


def test_blocks_that_may_no_longer_be_kept_are_not_counted_as_kept() -> None:
    world = World()
    made = keeping(world, 2048 * MIB)
    for _ in range(6):
        one_pass(made, world, SMALL)
        large = one_pass(made, world, LARGE)
    made.allow(large - 5)
    assert [one_pass(made, world, LARGE) for _ in range(3)] == [large - 5] * 3
    world.rest += 450 * MIB
    fewer = one_pass(made, world, LARGE), one_pass(made, world, LARGE)
    assert fewer[1] < large - 5 and fewer[1] <= world.most(LARGE, made.limit)
    assert one_pass(made, world, SMALL) == large - 5


def test_another_size_within_a_pass_is_recomputed() -> None:
    world = World()
    made = keeping(world, 2**40)
    for _ in range(3):
        one_pass(made, world, SMALL)
    with made.step(), made.batch("size"):
        assert (made(SMALL).blocks, made(LARGE).blocks) == (NUM_BLOCKS, 0)


def test_what_is_kept_is_said_once_it_has_settled(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "propagate", True)
    world = World()
    made = keeping(world, 2048 * MIB)
    with caplog.at_level(logging.INFO, logger="wanlora"):
        for _ in range(12):
            one_pass(made, world, SMALL, "768x416x1")
            kept = one_pass(made, world, LARGE, "768x416x21")
    said = list(dict.fromkeys(caplog.messages))
    assert len(said) == 2
    assert said[0].startswith("768x416x1: 40 of 40 blocks keep what they computed")
    assert said[1].startswith(f"768x416x21: {kept} of 40 blocks keep") and said[1].endswith("of 2.0 GiB")


def test_another_way_of_keeping_is_said_too(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "propagate", True)
    world = World()
    limit = world.rest + 2 * world.need(SMALL, NUM_BLOCKS) + MIB
    made = keeping(world, limit, attention=world.attention_a_token)
    with caplog.at_level(logging.INFO, logger="wanlora"):
        for _ in range(8):
            whole_pass(made, world, SMALL)
        whole = caplog.messages[-1]
        made.give_up()
        made.limit = world.rest + world.need(SMALL, 0, attention=20)
        for _ in range(8):
            whole_pass(made, world, SMALL)
    assert whole.startswith("size: 40 of 40 blocks keep what they computed, with all that the compiler likes to save;")
    assert caplog.messages[-1].startswith("size: 0 of 40 blocks keep what they computed, 20 the result of attention, ")
