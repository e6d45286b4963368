"""Libraries are loaded beside the reading of the model, on a card only, and nothing of it stays."""

from typing import Any

import pytest
import torch

from wanlora.training import warming
from wanlora.training.warming import compute_a_little, warming_up


@pytest.mark.parametrize("kernel", ["sdpa", "reference"])
def test_a_little_of_what_a_block_does_runs_and_draws_nothing(kernel: str) -> None:
    before = torch.get_rng_state()
    compute_a_little(torch.device("cpu"), torch.bfloat16, kernel)
    assert torch.equal(torch.get_rng_state(), before)


def test_only_a_card_is_warmed_up_the_one_that_is_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(warming, "compute_a_little", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr("torch.cuda.current_device", lambda: 1)
    for device in ("cpu", "cuda", "cuda:2"):
        with warming_up(torch.device(device), torch.float16, "flash"):
            pass
    assert [str(device) for device, *_ in calls] == ["cuda:1", "cuda:2"]
    assert {tuple(rest) for _, *rest in calls} == {(torch.float16, "flash")}
