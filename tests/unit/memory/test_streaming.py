"""Streaming changes where weights are and nothing that is computed."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from tests.unit.memory.wan import ARGUMENTS, adapted_wan, losses_and_gradients, train_step
from wanlora.foundation.errors import MemoryPlanError
from wanlora.memory.checkpointing import Recompute
from wanlora.memory.masters import frozen_tensors, lay_out
from wanlora.memory.placement import RestingPlace, streamed_indexes
from wanlora.memory.streaming import BlockStream, needed_next
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


def test_a_stream_without_blocks_does_nothing() -> None:
    model = adapted_wan()
    stream = BlockStream(list(model.blocks), 0, CPU)
    stream.attach()
    stream.reset()
    train_step(model)
    assert not stream.attached and stream.copies == 0 and stream.num_resident == 6


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
    assert [place.start for place in places] == [0, 256, 512] and num_bytes == 516
    flat = torch.zeros(num_bytes, dtype=torch.uint8)
    for value, place in enumerate(places, 1):
        place.view(flat).fill_(value)
    assert [place.view(flat).flatten().tolist() for place in places] == [[1] * 3, [2] * 10, [3]]


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


def test_tensors_of_streamed_blocks_rest_on_the_host() -> None:
    place = RestingPlace(torch.device("meta"), (1, 12))
    names = ("blocks.1.ffn.0.weight", "blocks.12.modulation", "blocks.2.ffn.0.weight", "head.head.weight")
    assert [place(name).type for name in names] == ["cpu", "cpu", "meta", "meta"]


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
