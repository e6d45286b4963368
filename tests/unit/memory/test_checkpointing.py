"""Recomputing blocks and keeping their inputs on the host: the same numbers with less kept."""

import logging
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from tests.unit.memory.wan import adapted_wan, losses_and_gradients, train_step
from wanlora.foundation import log as logs
from wanlora.memory.checkpointing import Keep, Kept, Recompute
from wanlora.memory.offload import HostBuffers, InputOffload
from wanlora.memory.streaming import BlockStream
from wanlora.memory.transfers import DirectTransfers
from wanlora.models.wan.transformer import WanTransformer

CPU = torch.device("cpu")


def count_forwards(model: WanTransformer) -> Counter[int]:
    calls: Counter[int] = Counter()

    def count(index: int) -> Any:
        return lambda module, args: calls.update([index])

    for index, block in enumerate(model.blocks):
        block.register_forward_pre_hook(count(index))
    return calls


def bytes_kept(model: WanTransformer) -> int:
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        train_step(model)
    return sum(storages.values())


def keeping(count: int) -> Keep:
    return lambda x: Kept(count)


def test_chosen_blocks_run_twice_and_the_others_once() -> None:
    model = adapted_wan(4)
    model.run_block = Recompute(list(model.blocks), (1, 3))
    calls = count_forwards(model)
    train_step(model)
    assert calls == {0: 1, 1: 2, 2: 1, 3: 2}


def test_the_last_blocks_are_let_off_first_and_streamed_ones_never() -> None:
    for count, kept in ((0, set()), (1, {4}), (2, {4, 2}), (5, {4, 2, 0})):
        model = adapted_wan(5)
        stream = BlockStream(list(model.blocks), 2, CPU)
        assert stream.streamed_indexes == (1, 3)
        model.run_block = runner = Recompute(list(model.blocks), stream=stream, keep=keeping(count))
        calls = count_forwards(model)
        train_step(model)
        assert calls == {index: 1 if index in kept else 2 for index in range(5)}
        assert (runner.kept, runner.recomputed) == (len(kept), 5 - len(kept))


def test_blocks_may_be_streamed_later() -> None:
    model = adapted_wan(4)
    stream = BlockStream(list(model.blocks), 0, CPU)
    stream.attach()
    model.run_block = runner = Recompute(list(model.blocks), stream=stream, keep=keeping(4))
    assert len(runner.optional) == 4
    stream.stream_more(2)
    runner.refresh()
    calls = count_forwards(model)
    train_step(model)
    assert len(runner.optional) == 2
    assert calls == {index: 1 if index in runner.optional else 2 for index in range(4)}


@pytest.mark.parametrize("count", [0, 1, 3, 4])
def test_what_is_kept_changes_no_bit_dropout_included(count: int) -> None:
    plain, chosen = adapted_wan(4, dropout=0.5), adapted_wan(4, dropout=0.5)
    chosen.run_block = Recompute(list(chosen.blocks), keep=keeping(count))
    torch.manual_seed(4)
    expected = losses_and_gradients(plain)
    torch.manual_seed(4)
    assert losses_and_gradients(chosen) == expected


def test_what_is_kept_may_change_from_step_to_step() -> None:
    plain, chosen = adapted_wan(4, dropout=0.5), adapted_wan(4, dropout=0.5)
    chosen.run_block = runner = Recompute(list(chosen.blocks))
    counts = iter((3, 0, 2))
    torch.manual_seed(4)
    expected = losses_and_gradients(plain)
    torch.manual_seed(4)

    def change() -> None:
        runner.keep = keeping(next(counts))

    change()
    assert losses_and_gradients(chosen, between=lambda: change() if runner.kept < 5 else None) == expected
    assert runner.kept == 5 and runner.recomputed == 7


def test_nothing_is_recomputed_without_gradients() -> None:
    model = adapted_wan(3)
    model.run_block = Recompute(list(model.blocks))
    calls = count_forwards(model)
    with torch.no_grad():
        model(torch.randn(1, 16, 1, 4, 4), torch.tensor([1.0]), [torch.randn(2, 32)])
    assert set(calls.values()) == {1}


def test_recomputing_gives_the_same_gradients_dropout_included_and_keeps_less() -> None:
    plain, recomputed = adapted_wan(3, dropout=0.5), adapted_wan(3, dropout=0.5)
    recomputed.run_block = Recompute(list(recomputed.blocks))
    torch.manual_seed(4)
    expected = losses_and_gradients(plain)
    torch.manual_seed(4)
    assert losses_and_gradients(recomputed) == expected
    assert bytes_kept(recomputed) < bytes_kept(plain) / 3


def offloading(model: WanTransformer) -> InputOffload:
    """Recompute with inputs that go through host buffers, by immediate copies."""
    offload = InputOffload(CPU, DirectTransfers())
    recompute = Recompute(list(model.blocks))

    def run(block: nn.Module, x: Tensor, *args: Tensor) -> Tensor:
        with offload.keep(x):
            return recompute(block, x, *args)

    model.run_block = run
    return offload


def test_inputs_on_the_host_give_the_same_gradients_with_one_buffer_a_block() -> None:
    expected = losses_and_gradients(adapted_wan(4))
    model = adapted_wan(4)
    offload = offloading(model)
    assert losses_and_gradients(model) == expected
    assert len(offload.buffers.free) == 4
    assert offload.buffers.num_bytes == 4 * 8 * 128 * 4  # blocks, tokens, width, float32


def test_only_the_residual_stream_goes_to_the_host_and_the_way_back_is_begun_one_block_ahead() -> None:
    offload = InputOffload(CPU, DirectTransfers())
    shared, weight = torch.randn(3), torch.randn(3, requires_grad=True)
    x = first = torch.randn(3, requires_grad=True)
    kept = []
    for _ in range(3):
        with offload.keep(x):
            y = x * weight * shared
        kept.append(offload._last() if offload._last else None)
        x = y
    assert all(kept) and len(offload.buffers.free) == 0
    last, before, two_before = kept[2], kept[1], kept[0]
    assert last is not None and before is not None and two_before is not None
    assert torch.equal(offload._unpack(last), last.on_host())
    assert list(offload._coming) == [id(before)]
    x.sum().backward()
    assert first.grad is not None and torch.allclose(first.grad, (shared * weight) ** 3)


def test_host_buffers_are_reused_and_grow_with_the_largest_input() -> None:
    buffers = HostBuffers(CPU, DirectTransfers())
    small, large = buffers.take(10), buffers.take(100)
    buffers.give(large)
    buffers.give(small)
    assert buffers.take(5) is small
    assert buffers.take(50) is large
    buffers.give(small)
    assert buffers.take(200).numel() == 200
    assert buffers.num_bytes == 300 and not buffers.free


def test_offload_on_a_cpu_says_that_it_has_no_effect(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "_said", set())
    expected = losses_and_gradients(adapted_wan(2))
    model = adapted_wan(2)
    model.run_block = Recompute(list(model.blocks), offload=True)
    with caplog.at_level(logging.INFO, logger="wanlora"):
        assert losses_and_gradients(model) == expected
    said = [record.message for record in caplog.records if "gradient_checkpointing_cpu_offload" in record.message]
    assert len(said) == 1 and "no effect" in said[0]
