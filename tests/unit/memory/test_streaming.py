"""Streaming changes where weights are and nothing that is computed."""

import gc
import weakref
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.unit.memory.wan import ARGUMENTS, adapted_wan, losses_and_gradients, train_step
from wanlora.foundation import log as logs
from wanlora.foundation.errors import MemoryPlanError
from wanlora.memory.checkpointing import Recompute
from wanlora.memory.masters import frozen_tensors, lay_out, views
from wanlora.memory.placement import streamed_indexes
from wanlora.memory.refilling import FreedMemory
from wanlora.memory.streaming import BlockStream, needed_next
from wanlora.memory.transfers import DirectTransfers
from wanlora.models.wan.transformer import WanTransformer

CPU = torch.device("cpu")


def streaming(num_streamed: int, ring_size: int = 2, *, num_blocks: int = 6) -> tuple[WanTransformer, BlockStream]:
    model = adapted_wan(num_blocks)
    stream = BlockStream(list(model.blocks), num_streamed, CPU, ring_size)
    model.run_block = Recompute(list(model.blocks))
    stream.attach()
    return model, stream


@pytest.mark.parametrize(("num_streamed", "ring_size"), [(1, 2), (3, 1), (3, 2), (4, 3), (6, 2)])
def test_losses_and_gradients_of_several_steps_are_the_same_to_the_bit(num_streamed: int, ring_size: int) -> None:
    plain = losses_and_gradients(adapted_wan())
    model, _ = streaming(num_streamed, ring_size)
    assert losses_and_gradients(model) == plain


def test_only_what_is_streamed_needs_to_be_recomputed() -> None:
    plain = losses_and_gradients(adapted_wan())
    model, stream = streaming(2)
    model.run_block = Recompute(list(model.blocks), stream.streamed_indexes)
    assert losses_and_gradients(model) == plain


def test_a_step_copies_each_streamed_block_twice_but_for_those_in_the_ring_at_the_turns() -> None:
    for num_streamed, ring_size in ((3, 2), (5, 2), (6, 3)):
        model, stream = streaming(num_streamed, ring_size)
        train_step(model)
        copies, waits = stream.copies, stream.waits
        train_step(model)
        assert stream.copies - copies == 2 * (num_streamed - ring_size)
        assert stream.waits - waits == 2 * num_streamed - len(
            {0, 5} & {*stream.streamed_indexes}
        )  # at a turn one use follows another


def test_every_use_finds_its_copy_on_the_way() -> None:
    model, stream = streaming(6)
    for _ in range(3):
        train_step(model)
    assert stream.misses == 1  # the very first block


def test_forwards_without_gradients_stream_round_and_round() -> None:
    model, stream = streaming(3)
    plain = adapted_wan()
    with torch.no_grad():
        expected = plain(*ARGUMENTS)
        for _ in range(3):
            assert torch.equal(model(*ARGUMENTS), expected)
    assert stream.misses == 0
    copies = stream.copies
    with torch.no_grad():
        model(*ARGUMENTS)
    assert stream.copies - copies == 3


def test_previews_between_steps_change_nothing() -> None:
    plain = losses_and_gradients(adapted_wan())
    model, _ = streaming(3)

    def preview() -> None:
        with torch.no_grad():
            model(*ARGUMENTS)
            model(*ARGUMENTS)

    assert losses_and_gradients(model, between=preview) == plain


def test_an_exception_in_the_middle_of_a_pass_leaves_a_stream_that_works() -> None:
    plain = losses_and_gradients(adapted_wan())
    model, stream = streaming(4)

    def stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        raise RuntimeError("interrupted")

    for index in (1, 3, 5):
        hook = model.blocks[index].register_forward_pre_hook(stop)
        with pytest.raises(RuntimeError, match="interrupted"):
            train_step(model)
        hook.remove()
        stream.reset()
    assert losses_and_gradients(model) == plain


@pytest.mark.parametrize("num_streamed", [0, 3])
def test_streaming_more_blocks_between_steps_changes_no_bit(num_streamed: int) -> None:
    plain = losses_and_gradients(adapted_wan())
    model = adapted_wan()
    stream = BlockStream(list(model.blocks), num_streamed, CPU)
    stream.attach()
    model.run_block = Recompute(list(model.blocks))
    before = set(stream.streamed_indexes)
    counts = iter((2, 9))
    added = []
    assert losses_and_gradients(model, between=lambda: added.append(stream.stream_more(next(counts, 1)))) == plain
    assert added == [2, 4 - num_streamed, 0]
    assert before < set(stream.streamed_indexes) == set(range(6))
    assert stream.num_resident == 0 and stream.ring_size == 2
    train_step(model)
    copies = stream.copies
    train_step(model)
    assert stream.copies - copies == 2 * (6 - 2)


@pytest.mark.parametrize("num_streamed", [4, 6])
def test_resizing_the_ring_between_steps_changes_no_bit(num_streamed: int) -> None:
    rings = [2, 5, 99, 2, 1, 3, 99, 99, 2]
    plain = losses_and_gradients(adapted_wan(), steps=10)
    model, stream = streaming(num_streamed)
    upcoming, sizes = iter(rings), []

    def resize() -> None:
        stream.resize(next(upcoming, 2))
        sizes.append(stream.ring_size)

    assert losses_and_gradients(model, steps=10, between=resize) == plain
    assert sizes == [min(ring, num_streamed) for ring in [*rings, 2]]
    expected = adapted_wan().state_dict()
    stream.detach()
    frozen = {name for name, value in model.named_parameters() if not value.requires_grad}
    assert all(torch.equal(model.state_dict()[name].float(), expected[name].float()) for name in frozen)


def test_copies_follow_the_ring_and_what_is_needed_soonest_stays() -> None:
    model, stream = streaming(6)

    def copies(steps: int = 1) -> int:
        before = stream.copies
        for _ in range(steps):
            train_step(model)
        return stream.copies - before

    copies()
    assert copies() == 2 * (6 - 2)
    stream.resize(5)
    assert copies() == (6 - 2) + (6 - 5)  # forward finds two of them there
    assert copies(3) == 3 * 2 * (6 - 5)
    stream.resize(6)
    assert copies() == 1 and copies(3) == 0
    stream.resize(3)
    assert copies() == 2 * (6 - 3)  # blocks 0 to 2 have stayed
    assert stream.misses == 1


@pytest.mark.parametrize(("num_streamed", "lasting"), [(6, 2), (6, 3), (4, 2)])
def test_buffers_that_pass_go_one_by_one_in_forward_and_save_its_copies(num_streamed: int, lasting: int) -> None:
    plain = losses_and_gradients(adapted_wan(), steps=6)
    model, stream = streaming(num_streamed)
    slot, rings, copies = stream._slot_bytes, list[list[int]](), list[int]()
    most, gone = num_streamed, num_streamed - lasting
    for block in model.blocks:
        block.register_forward_hook(lambda block, args, out: rings[-1].append(stream.ring_size) if rings else None)

    def resize() -> None:
        copies.append(stream.copies)
        rings.append([])
        if len(copies) % 2:
            stream.resize(num_streamed)
        else:
            stream.resize(lasting, passing=gone * slot)
            assert stream.lasting == lasting and stream.passing_bytes == gone * slot

    assert losses_and_gradients(model, steps=6, between=resize) == plain
    assert rings[1][:6] == [lasting + gone * (5 - index) // 5 for index in range(6)]
    # Forward finds all there and backward what is left; the next forward with room for all what backward has left.
    assert [after - before for before, after in pairwise(copies)] == [most - 2, *[gone] * 4]
    assert stream.misses == 1


@pytest.mark.parametrize("slots", [1, 2.5, 4, 8, 99])
def test_buffers_that_pass_never_take_more_than_forward_has_left_by_then(slots: float) -> None:
    model, stream = streaming(6)
    passing, taken = int(slots * stream._slot_bytes), list[int]()
    for block in model.blocks:
        block.register_forward_hook(lambda block, args, out: taken.append(stream.passing_bytes))
    stream.resize(6)
    train_step(model)
    taken.clear()
    stream.resize(2, passing=passing)
    assert stream.passing_bytes == min(int(slots), 4) * stream._slot_bytes
    train_step(model)
    left = [passing * (5 - index) / 5 for index in range(6)]
    slot = stream._slot_bytes
    assert taken[:6] == [min(int(there / slot), 4) * slot for there in left] and taken[5] == 0


def test_as_many_buffers_pass_as_there_is_room_for_and_none_are_made() -> None:
    _, stream = streaming(6)
    slot = stream._slot_bytes
    stream.resize(3, passing=99 * slot)
    assert (stream.ring_size, stream.passing_bytes) == (3, 0)
    stream.resize(6)
    stream.resize(2, passing=2 * slot + slot // 2)
    assert (stream.ring_size, stream.passing_bytes) == (4, 2 * slot)
    stream.resize(2)
    assert (stream.ring_size, stream.passing_bytes) == (2, 0)


def test_buffers_that_are_dropped_are_gone_and_their_blocks_look_at_the_host() -> None:
    model, stream = streaming(6)
    stream.resize(6)
    train_step(model)
    buffers = [weakref.ref(slot.buffer.untyped_storage()) for slot in stream._ring]
    storages = [frozen_tensors(block)[0].untyped_storage().data_ptr() for block in model.blocks]
    hosts = [master.flat.untyped_storage().data_ptr() for master in stream._masters.values()]
    assert not set(storages) & set(hosts)
    stream.resize(2)
    gc.collect()
    assert sum(buffer() is not None for buffer in buffers) == 2 == stream.ring_size
    assert [frozen_tensors(block)[0].untyped_storage().data_ptr() for block in model.blocks][2:] == hosts[2:]


def test_what_looks_at_saved_tensors_knows_the_ring_of_the_moment() -> None:
    model, stream = streaming(6)
    stream.resize(6)
    train_step(model)
    check, weight = stream.watch(model.blocks[4]), frozen_tensors(model.blocks[4])[0]
    assert check is not None
    check(weight)
    with pytest.raises(MemoryPlanError, match="view"):
        check(weight.view(-1))
    stream.resize(2)
    later = stream.watch(model.blocks[4])
    assert later is not None
    later(weight.view(-1))  # that shows the master, which stays as it is


class Order(DirectTransfers):
    """Copies that are done at once, and a record of what waited for which."""

    def __init__(self) -> None:
        self.copied = 0
        self.waited: list[object] = []

    def copy(self, target: Tensor, source: Tensor, *, after: Any = None) -> Any:
        super().copy(target, source)
        self.copied += 1
        return f"copy {self.copied}"

    def wait(self, mark: Any) -> None:
        self.waited.append(mark)

    def mark(self) -> Any:
        return "computed"

    def finish(self) -> None:
        raise AssertionError("the host must not wait between steps")


def test_computation_waits_for_the_last_copy_into_a_buffer_before_it_is_given_away() -> None:
    _, stream = streaming(6)
    stream._transfers = order = Order()
    stream.resize(6)
    assert [slot.free for slot in stream._ring[2:]] == ["computed"] * 4
    stream._prepare(0, turns=True)  # queues the copies of all, none but the first of which is used
    assert order.copied == 6 and order.waited == ["copy 1"]
    stream.resize(2)
    assert sorted(map(str, order.waited[1:])) == ["copy 3", "copy 4", "copy 5", "copy 6"]
    assert stream._ring[0].free == "computed"


def test_a_ring_that_memory_does_not_suffice_for_works_with_what_it_got(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = losses_and_gradients(adapted_wan())
    model, stream = streaming(6)
    make = stream._make_slot
    made: list[Any] = []

    def run_out() -> Any:
        if len(made) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        made.append(make())
        return made[-1]

    monkeypatch.setattr(stream, "_make_slot", run_out)
    with pytest.raises(torch.OutOfMemoryError):
        stream.resize(6)
    assert stream.ring_size == 4
    assert losses_and_gradients(model) == plain


class Freed(FreedMemory):
    """Backward frees room for so many buffers with every block but the last."""

    def __init__(self, each: int, size: int) -> None:
        super().__init__(lambda: 0)
        self.each, self.size = each, size
        self.room = 0

    def begin(self) -> None:
        self.room = -self.each * self.size

    def spare(self) -> int:
        self.room += 0 if self.asked else self.each * self.size
        self.asked = True
        return self.room

    def take(self, num_bytes: int) -> None:
        self.room -= num_bytes

    asked = False


def growing(stream: BlockStream, each: int, most: int) -> None:
    """Let the next backward make buffers."""
    freed = Freed(each, stream._slot_bytes)
    prepare = stream._before_backward

    def before(index: int) -> None:
        freed.asked = False
        prepare(index)

    stream._before_backward = before  # type: ignore[method-assign]
    stream.grow(most, freed)


def test_backward_makes_buffers_of_what_it_frees_and_the_next_forward_finds_its_blocks() -> None:
    plain = losses_and_gradients(adapted_wan(), steps=4)
    model, stream = streaming(6)
    history: list[tuple[int, int]] = []

    def between() -> None:
        history.append((stream.ring_size, stream.copies))
        stream.resize(6 if len(history) == 1 else 2)
        if len(history) == 2:
            stream.grow(0, Freed(1, 1))  # to less than there is

    growing(stream, 1, 6)
    assert losses_and_gradients(model, steps=4, between=between) == plain
    rings, copies = zip(*history, strict=True)
    assert rings == (6, 6, 2, 2)
    # Forward copies all. Backward finds 5 and 4 there, copies 3 to 0, and 4 and 5 again for which there are buffers.
    assert copies[0] == 6 + 6
    assert copies[1] == copies[0]
    assert stream.misses == 1
    checks = [stream.watch(block) for block in model.blocks]
    assert all(checks)


def test_the_ring_grows_no_further_than_it_may_and_not_behind_a_resize() -> None:
    model, stream = streaming(6)
    growing(stream, 2, 4)
    train_step(model)
    assert stream.ring_size == 4
    stream.resize(2)
    train_step(model)
    assert stream.ring_size == 2


def test_what_autograd_saves_is_watched_in_buffers_that_backward_has_made() -> None:
    model, stream = streaming(6)
    growing(stream, 1, 6)
    train_step(model)
    made = {slot.buffer.untyped_storage().data_ptr() for slot in stream._ring[2:]}
    blocks = [block for block in model.blocks if frozen_tensors(block)[0].untyped_storage().data_ptr() in made]
    weight, check = frozen_tensors(blocks[0])[0], stream.watch(blocks[0])
    assert check is not None
    with pytest.raises(MemoryPlanError, match="view"):
        check(weight.view(-1))


def test_freed_memory_in_pieces_too_small_is_said_once_and_changes_no_number(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logs.log, "propagate", True)
    monkeypatch.setattr(logs, "_said", set())
    plain = losses_and_gradients(adapted_wan())
    model, stream = streaming(6)

    def run_out() -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(stream, "_make_slot", run_out)
    growing(stream, 1, 6)
    assert losses_and_gradients(model, between=lambda: stream.grow(6, Freed(1, 1))) == plain
    (message,) = dict.fromkeys(caplog.messages)
    assert stream.ring_size == 2 and "in pieces too small for a swapped block" in message


def test_a_stream_without_blocks_does_nothing() -> None:
    model = adapted_wan()
    stream = BlockStream(list(model.blocks), 0, CPU)
    stream.attach()
    stream.reset()
    stream.resize(5)
    train_step(model)
    assert not stream.attached and stream.ring_size == 0 and stream.copies == 0 and stream.num_resident == 6


def test_two_forwards_before_their_backwards_work() -> None:
    def accumulated(model: WanTransformer) -> list[Tensor]:
        losses = [model(*ARGUMENTS).square().mean(), model(ARGUMENTS[0] * 2, *ARGUMENTS[1:]).square().mean()]
        (losses[0] + losses[1]).backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    plain = accumulated(adapted_wan())
    ours = accumulated(streaming(4)[0])
    assert len(plain) == len(ours) > 0 and all(map(torch.equal, plain, ours))


def test_detaching_gives_back_the_model_as_it_was() -> None:
    model = adapted_wan()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    identities = [id(tensor) for tensor in (*model.parameters(), *model.buffers())]
    stream = BlockStream(list(model.blocks), 3, CPU)
    model.run_block = Recompute(list(model.blocks))
    stream.attach()
    assert stream.attached
    with torch.no_grad():
        model(*ARGUMENTS)
    during = model.state_dict()
    stream.detach()
    assert not stream.attached
    copies = stream.copies
    with torch.no_grad():
        model(*ARGUMENTS)
    assert stream.copies == copies
    assert [id(tensor) for tensor in (*model.parameters(), *model.buffers())] == identities
    for state in (during, model.state_dict()):
        assert state.keys() == before.keys()
        assert all(torch.equal(state[name].float(), before[name].float()) for name in before)
    stream.attach()
    assert stream.attached


def test_adapters_are_not_touched_and_all_else_of_a_streamed_block_lies_in_its_master() -> None:
    model = adapted_wan()
    adapters = {name: p.data_ptr() for name, p in model.named_parameters() if p.requires_grad}
    stream = BlockStream(list(model.blocks), 3, CPU)
    stream.attach()
    assert {name: p.data_ptr() for name, p in model.named_parameters() if p.requires_grad} == adapters
    for index in stream.streamed_indexes:
        storages = {tensor.untyped_storage().data_ptr() for tensor in frozen_tensors(model.blocks[index])}
        assert len(storages) == 1
    with pytest.raises(RuntimeError, match="already"):
        stream.attach()


def test_the_trained_weights_seen_by_the_optimizer_are_the_ones_in_the_model() -> None:
    model, _ = streaming(3)
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    losses_and_gradients(model)
    after = [p.detach() for p in model.parameters() if p.requires_grad]
    assert not all(map(torch.equal, before, after))


def test_places_are_aligned_and_do_not_overlap() -> None:
    tensors = [torch.zeros(3, dtype=torch.uint8), torch.zeros(2, 5, dtype=torch.bfloat16), torch.zeros(())]
    places, num_bytes = lay_out(tensors)
    assert [place.start for place in places] == [0, 256, 512] and num_bytes == 768
    flat = torch.zeros(num_bytes, dtype=torch.uint8)
    for value, view in enumerate(views(flat, places), 1):
        view.fill_(value)
    assert [view.flatten().tolist() for view in views(flat, places)] == [[1] * 3, [2] * 10, [3]]
    for view, tensor, place in zip(views(flat, places), tensors, places, strict=True):
        assert (view.shape, view.dtype, view.stride()) == (tensor.shape, tensor.dtype, tensor.stride())
        assert view.data_ptr() - flat.data_ptr() == place.start and place.end <= num_bytes


def test_streamed_blocks_are_evenly_spaced() -> None:
    assert streamed_indexes(40, 10) == tuple(range(2, 40, 4))
    assert streamed_indexes(6, 6) == (0, 1, 2, 3, 4, 5)
    assert streamed_indexes(40, 0) == ()
    for count in range(1, 41):
        indexes = streamed_indexes(40, count)
        assert len(set(indexes)) == count and all(0 <= index < 40 for index in indexes)
        gaps = [after - before for before, after in pairwise(indexes)]
        assert not gaps or max(gaps) - min(gaps) <= 1


def test_more_streamed_blocks_than_there_are_is_an_error_that_names_both() -> None:
    with pytest.raises(MemoryPlanError, match="41 blocks are to be streamed, but this model has 40"):
        streamed_indexes(40, 41)


def test_what_is_needed_next_follows_the_direction() -> None:
    streamed = (1, 3, 5)
    assert needed_next(streamed, 0, rising=True, turns=True, count=2) == [1, 3]
    assert needed_next(streamed, 3, rising=True, turns=True, count=2) == [3, 5]
    assert needed_next(streamed, 5, rising=True, turns=True, count=2) == [5, 3]
    assert needed_next(streamed, 4, rising=False, turns=True, count=2) == [3, 1]
    assert needed_next(streamed, 1, rising=False, turns=True, count=2) == [1, 3]
    assert needed_next(streamed, 5, rising=True, turns=False, count=2) == [5, 1]
    assert needed_next(streamed, 0, rising=False, turns=False, count=3) == [1, 3, 5]


def test_what_looks_at_saved_tensors_is_made_once_a_start() -> None:
    model, stream = streaming(3)
    checks = [stream.watch(block) for block in model.blocks]
    assert [index for index, check in enumerate(checks) if check] == list(stream.streamed_indexes)
    assert all(stream.watch(block) is check for block, check in zip(model.blocks, checks, strict=True))
    stream.stream_more(1)
    more = [stream.watch(block) for block in model.blocks]
    assert [index for index, check in enumerate(more) if check] == list(stream.streamed_indexes)
    train_step(model)
    (check, index) = next((check, index) for index, check in enumerate(more) if check)
    weight = frozen_tensors(model.blocks[index])[0]
    check(weight)
    stream.detach()
    assert not any(map(stream.watch, model.blocks))
