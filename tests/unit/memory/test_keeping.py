"""How many blocks are kept, in a world where what a pass needs is known."""

import logging
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from wanlora.foundation.log import log
from wanlora.memory.keeping import Keeping

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

    def need(self, x: Tensor, kept: int) -> int:
        tokens, input_bytes = x.shape[1], x.numel() * 4
        at_the_turn = (kept * self.kept_a_token + self.loss_a_token) * tokens + (NUM_BLOCKS - kept) * input_bytes
        recomputing = (NUM_BLOCKS - kept) * input_bytes + self.kept_a_token * tokens if kept < NUM_BLOCKS else 0
        return self.workspace_a_token * tokens + max(at_the_turn, recomputing)

    def most(self, x: Tensor, limit: int) -> int:
        """The most blocks whose need stays below the limit."""
        return max((k for k in range(NUM_BLOCKS + 1) if self.rest + self.need(x, k) <= limit), default=0)


def stream(tokens: int) -> Tensor:
    return torch.empty(1, tokens, WIDTH, device="meta")


SMALL, LARGE = stream(1000), stream(8000)


def keeping(world: World, limit: int, *, activations: int | None = None, everything: bool = False) -> Keeping:
    return Keeping(NUM_BLOCKS, NUM_BLOCKS, meter=world, limit=limit, activations=activations, everything=everything)


def one_pass(made: Keeping, world: World, x: Tensor, label: str = "size") -> int:
    """The number of blocks kept in a pass."""
    with made.step(), made.batch(label):
        kept = made(x)
        assert all(made(x) == kept for _ in range(3))
        world.now_peak = max(world.now_peak, world.rest + world.need(x, kept))
    return kept


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


def test_an_allocator_that_rearranges_memory_lowers_the_limit_but_not_without_end() -> None:
    world = World()
    limit = 2048 * MIB
    made = keeping(world, limit)
    for _ in range(40):
        with made.step(), made.batch("size"):
            made(LARGE)
            world.now_peak, world.num_retries = world.rest + world.need(LARGE, made.num_kept), world.num_retries + 1
    assert made.limit == int(0.85 * limit)
    assert made.num_kept <= world.most(LARGE, made.limit)


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
    assert made.give_up() == before
    assert made.limit == int(0.95 * peak)
    assert one_pass(made, world, LARGE) == 0
    assert made.give_up() == 0
    after = [one_pass(made, world, LARGE) for _ in range(5)]
    assert 0 < after[-1] < before and all(count <= world.most(LARGE, made.limit) for count in after)
    assert one_pass(made, world, SMALL) <= world.most(SMALL, made.limit)


def test_everything_is_kept_until_memory_runs_out_and_smaller_sizes_go_on_so() -> None:
    made = Keeping(NUM_BLOCKS, NUM_BLOCKS, everything=True)
    assert made(LARGE) == NUM_BLOCKS  # also outside of a step
    with made.step(), made.batch("size"):
        assert made(SMALL) == NUM_BLOCKS
    with made.step(), made.batch("size"):
        assert made(LARGE) == NUM_BLOCKS
    assert made.give_up() == NUM_BLOCKS
    for x, expected in ((LARGE, 0), (stream(9000), 0), (SMALL, NUM_BLOCKS)):
        with made.step(), made.batch("size"):
            assert made(x) == expected


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
        assert made(SMALL) == 0
    world = World()
    made = keeping(world, 2**40)
    for _ in range(3):
        one_pass(made, world, SMALL)
    assert made.num_kept == NUM_BLOCKS and made(SMALL) == 0


def test_another_size_within_a_pass_is_recomputed() -> None:
    world = World()
    made = keeping(world, 2**40)
    for _ in range(3):
        one_pass(made, world, SMALL)
    with made.step(), made.batch("size"):
        assert (made(SMALL), made(LARGE)) == (NUM_BLOCKS, 0)


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
