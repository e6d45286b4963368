"""Twenty steps of training are the same whatever is done about memory: to the bit in plain PyTorch, 1e-3 compiled."""

from collections.abc import Callable
from functools import cache

import pytest
import torch

from tests.unit.memory.kept import cutting_backend
from tests.unit.memory.wan import adapted_wan, losses_and_gradients
from wanlora.memory import compile as compiling
from wanlora.memory.checkpointing import Kept, Recompute
from wanlora.memory.compile import compile_blocks
from wanlora.memory.streaming import BlockStream
from wanlora.models.wan.transformer import WanTransformer

CPU = torch.device("cpu")
STEPS = 20


@cache
def plain() -> list[float]:
    """Losses of every step, then the last gradient."""
    return losses_and_gradients(adapted_wan(4), steps=STEPS)


def changing(model: WanTransformer, choices: list[Kept], stream: BlockStream | None = None) -> Callable[[], None]:
    """Recompute with another choice in every step; returns what goes on to the next."""
    made = Recompute(list(model.blocks), stream=stream)
    model.run_block = made
    turns = iter(choices * STEPS)

    def change() -> None:
        kept = next(turns)
        made.keep = lambda x: kept

    change()
    return change


@pytest.mark.parametrize("num_streamed", [0, 2, 4])
def test_streaming_and_recomputation_change_no_bit(num_streamed: int) -> None:
    model = adapted_wan(4)
    stream = BlockStream(list(model.blocks), num_streamed, CPU)
    stream.attach()
    change = changing(model, [Kept(), Kept(1), Kept(4)], stream)
    assert losses_and_gradients(model, steps=STEPS, between=change) == plain()


@pytest.mark.parametrize("num_streamed", [4, pytest.param(0, marks=pytest.mark.slow)])
def test_compiled_blocks_stay_within_a_thousandth_whatever_they_save(
    num_streamed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(compiling, "saving_backend", lambda save, mode, **_: cutting_backend(save))
    model = adapted_wan(4)
    stream = BlockStream(list(model.blocks), num_streamed, CPU)
    stream.attach()
    compile_blocks(model.blocks)
    choices = [Kept(), Kept(2, attention=1), Kept(0, attention=4), Kept(4), Kept(4, everything=True)]
    change = changing(model, choices, stream)
    losses = losses_and_gradients(model, steps=STEPS, between=change)[:STEPS]
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(plain()[:STEPS]), rtol=1e-3, atol=0)
