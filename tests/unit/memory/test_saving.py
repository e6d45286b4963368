"""What compiled blocks save for their backward, and that streamed ones may."""

from typing import get_args

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy

from tests.unit.memory.kept import cutting_backend
from tests.unit.memory.wan import adapted_wan, losses_and_gradients
from wanlora.foundation.errors import MemoryPlanError
from wanlora.memory import checkpointing
from wanlora.memory import compile as compiling
from wanlora.memory.checkpointing import Kept, Recompute
from wanlora.memory.compile import chooses_what_to_save, compile_blocks, saving_backend
from wanlora.memory.offload import InputOffload
from wanlora.memory.saving import Save, mark
from wanlora.memory.streaming import BlockStream
from wanlora.memory.transfers import transfers_for

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Save]:
    """The ways to save that graphs were made for; they are cut as ever and run as they are."""
    torch._dynamo.reset()
    seen: list[Save] = []

    def backend(save: Save, mode: str | None, *, cpp_wrapper: bool) -> object:
        seen.append(save)
        return cutting_backend(save)

    monkeypatch.setattr(compiling, "saving_backend", backend)
    return seen


def test_kept_streamed_blocks_give_the_same_numbers_and_are_called_once(asked: list[Save]) -> None:
    expected = losses_and_gradients(adapted_wan(4), steps=2)
    model = adapted_wan(4)
    blocks = list(model.blocks)
    stream = BlockStream(blocks, 4, CPU)
    stream.attach()
    compile_blocks(blocks)
    assert all(map(chooses_what_to_save, blocks))
    choices = iter((Kept(2, attention=2), Kept(4, everything=True)))
    model.run_block = runner = Recompute(blocks, stream=stream)
    assert len(runner.optional) == 4
    calls: list[int] = []
    blocks[0].register_forward_pre_hook(lambda module, args: calls.append(1))
    kept = next(choices)
    runner.keep = lambda x: kept

    def change() -> None:
        nonlocal kept
        kept = next(choices, kept)

    result = losses_and_gradients(model, steps=2, between=change)
    torch.testing.assert_close(torch.tensor(result), torch.tensor(expected), rtol=1e-3, atol=1e-5)
    assert asked == ["attention", "products", "everything"]
    assert (runner.kept, runner.recomputed, runner.attention_kept) == (2 + 4, 0, 2)
    assert len(calls) == 2
    assert stream.copies == 4 + 3 * (4 - 2) and stream.misses == 1


@pytest.mark.parametrize("save", get_args(Save))
def test_no_cut_goes_through_a_weight_in_another_shape(save: Save) -> None:
    def product(x: Tensor, weight: Tensor) -> Tensor:
        return (x @ weight.t().unflatten(1, (2, -1)).flatten(1)).unflatten(0, (2, -1)).relu()

    graph = make_fx(product)(torch.ones(4, 8), torch.ones(6, 8)).graph
    mark(graph, save)
    recomputed = {node.name for node in graph.nodes if node.meta.get("recompute") is CheckpointPolicy.MUST_RECOMPUTE}
    of_weight = {"t", "view", "view_1"}
    assert recomputed & {"t", "view", "view_1", "view_2"} == (
        of_weight | {"view_2"} if save == "attention" else of_weight
    )


class _Viewing(nn.Linear):
    """Saves a view of its weight, whatever is asked for."""

    def forward(self, x: Tensor, save: Save = "products") -> Tensor:
        return super().forward(x)


@pytest.mark.parametrize(("kept", "offload"), [(Kept(3), False), (Kept(attention=3), False), (Kept(attention=3), True)])
def test_a_view_of_a_streamed_weight_is_not_saved_without_a_word(
    monkeypatch: pytest.MonkeyPatch, kept: Kept, offload: bool
) -> None:
    monkeypatch.setattr(checkpointing, "chooses_what_to_save", lambda block: True)
    blocks = [_Viewing(8, 8).requires_grad_(False) for _ in range(3)]
    stream = BlockStream(blocks, 2, CPU, ring_size=1)
    stream.attach()
    runner = Recompute(blocks, stream=stream, keep=lambda x: kept, offload=offload)
    monkeypatch.setattr(runner, "_offload_for", lambda device: InputOffload(CPU, transfers_for(CPU)))
    x = torch.ones(2, 8, requires_grad=True)
    for index, block in enumerate(blocks):
        if index in stream.streamed_indexes:
            with pytest.raises(MemoryPlanError, match="view of them for backward"):
                runner(block, x)
        else:
            assert runner(block, x).requires_grad


@pytest.mark.parametrize("save", ["products", "attention", "everything"])
def test_gradients_behind_a_rotation_are_computed_twice_and_a_mode_keeps_its_options(
    save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed: list[dict[str, object]] = []

    def compile_fx(graph: object, inputs: object, config_patches: dict[str, object]) -> None:
        handed.append(config_patches)

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    for mode in (None, "max-autotune-no-cudagraphs", "tuned"):
        saving_backend(save, mode)(torch.fx.GraphModule(nn.Module(), torch.fx.Graph()), [])
    reads = 2 + 2 + 1  # both elements of a pair, cosine and sine, weight of the norm
    assert all(options["realize_reads_threshold"] == reads for options in handed)
    assert ["max_autotune" in options for options in handed] == [False, True, False]
    assert ["coordinate_descent_tuning" in options for options in handed] == [False, True, True]
    with torch._inductor.config.patch(handed[0]):
        assert torch._inductor.config.realize_reads_threshold == reads


def test_other_compilers_take_no_wishes(asked: list[Save]) -> None:
    model = adapted_wan(2)
    compile_blocks(model.blocks, backend="eager")
    assert not any(map(chooses_what_to_save, model.blocks))
    assert not any(map(chooses_what_to_save, adapted_wan(2).blocks))
    assert not Recompute(list(model.blocks)).chooses
    losses_and_gradients(model, steps=1)
    assert asked == []
