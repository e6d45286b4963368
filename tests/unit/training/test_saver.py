"""What is saved of a run and put back into another."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.unit.training.parts import step_of
from wanlora.foundation.errors import CheckpointError
from wanlora.lora.network import LoRANetwork, inject
from wanlora.training.position import Position
from wanlora.training.saver import restore
from wanlora.training.state import RunRecord, SavedState
from wanlora.training.step import TrainingStep

RECORD = RunRecord(position=Position(step=3), seed=1, epoch_length=4, total_steps=9, losses=[])


def parts(*, seed: int = 0, rank: int = 2, **options: Any) -> tuple[LoRANetwork, TrainingStep]:
    """An adapted layer, and AdamW over its adapter."""
    network = inject(nn.Sequential(nn.Linear(4, 4)), ("0",), rank=rank, generator=torch.Generator().manual_seed(seed))
    step = step_of(nn.Linear(1, 1))
    step.parameters = network.parameters()
    step.optimizer = torch.optim.AdamW(network.groups(1e-3), **options)
    return network, step


def trained(**options: Any) -> tuple[LoRANetwork, TrainingStep]:
    network, step = parts(**options)
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    step.optimizer.step()
    return network, step


def state_of(network: LoRANetwork, step: TrainingStep, **changes: Any) -> SavedState:
    saved: dict[str, Any] = {
        "path": Path("style-state"),
        "record": RECORD,
        "adapter": {name: tensor.clone() for name, tensor in network.state_dict().items()},
        "optimizer": step.optimizer.state_dict(),
        "rates": {},
        "scaler": {},
    }
    return SavedState(**{**saved, **changes})


def test_weights_and_moments_come_back() -> None:
    network, step = trained(weight_decay=0.1)
    other, fresh = parts(seed=1)
    restore(state_of(network, step), other, fresh, {})
    for name, tensor in network.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)
    for one, two in zip(network.parameters(), other.parameters(), strict=True):
        assert torch.equal(step.optimizer.state[one]["exp_avg"], fresh.optimizer.state[two]["exp_avg"])


def test_arguments_given_anew_win_over_the_saved_ones() -> None:
    network, step = trained(weight_decay=0.1, betas=(0.9, 0.99))
    other, fresh = parts(seed=1, weight_decay=0.3)
    restore(state_of(network, step), other, fresh, {"weight_decay": 0.3})
    (group,) = fresh.optimizer.param_groups
    assert (group["weight_decay"], group["betas"], group["name"]) == (0.3, (0.9, 0.99), "unet")


def test_the_loss_scale_comes_back() -> None:
    network, step = trained()
    other, fresh = parts()
    fresh.scaler = torch.amp.GradScaler("cpu")
    saved = torch.amp.GradScaler("cpu", init_scale=64.0)
    restore(state_of(network, step, scaler=saved.state_dict()), other, fresh, {})
    assert fresh.scaler.get_scale() == 64.0


def test_a_state_of_another_rank_is_refused() -> None:
    network, step = trained()
    with pytest.raises(CheckpointError, match="--network_dim"):
        restore(state_of(network, step), *parts(rank=3), {})


def test_a_state_of_other_parameter_groups_is_refused() -> None:
    network, step = trained()
    other, fresh = parts()
    fresh.optimizer = torch.optim.AdamW(other.groups(1e-3, 4.0))
    with pytest.raises(CheckpointError, match="another optimizer or other parameter groups"):
        restore(state_of(network, step), other, fresh, {})
