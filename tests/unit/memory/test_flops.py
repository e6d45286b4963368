"""Arithmetic of a step, against a count of what is multiplied and against figures worked out by hand."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.unit.memory.adapters import adapter_parameters
from wanlora.memory.flops import forward_flops, step_flops
from wanlora.models.wan.spec import TASKS, WanSizes
from wanlora.models.wan.transformer import WanTransformer

WAN_14B = TASKS["t2v-14B"].sizes
SMALL = WanSizes(dim=256, ffn_dim=704, num_layers=2, text_dim=48, freq_dim=32, text_len=512)


def test_a_forward_pass_multiplies_as_much_as_is_foretold() -> None:
    model = WanTransformer(SMALL)
    model.attention = "reference"
    latents = torch.randn(2, 16, 2, 8, 12)
    text = [torch.randn(512, 48)] * 2
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(latents, torch.tensor([500.0, 100.0]), text)
    foretold = forward_flops(SMALL, tokens=48, batch=2)
    timestep_path = 2 * 2 * 256 * (32 + 256 + 6 * 256)
    assert foretold.total + timestep_path == counter.get_total_flops()


def test_a_forward_pass_of_14b_is_the_sum_worked_out_by_hand() -> None:
    tokens = 7488
    by_hand = 2 * 11.95e9 * tokens + 2.1e12 + 4 * 40 * 5120 * tokens * (tokens + 512)
    assert forward_flops(WAN_14B, tokens).total == pytest.approx(by_hand, rel=0.01)


@pytest.mark.parametrize(
    ("tokens", "forward", "backward", "recomputed", "kept"),
    [
        (2304, 536, 467, 0.29, 0.20),
        (1248, 318, 312, 0.16, 0.11),
        (7488, 622, 524, 1.17, 0.83),
        (3744, 533, 487, 0.51, 0.35),
    ],
)
def test_a_step_takes_what_its_rates_allow(
    tokens: int, forward: float, backward: float, recomputed: float, kept: float
) -> None:
    """Seconds at 0.70 PFLOP/s for weights and measured rates (TFLOP/s) of both directions of attention."""
    once = forward_flops(WAN_14B, tokens).attention
    for blocks, expected in ((40, recomputed), (0, kept)):
        step = step_flops(WAN_14B, tokens, recomputed=blocks)
        again = blocks / 40
        assert step.attention == pytest.approx(once * (3.5 + again))
        seconds = step.linear / 0.70e15 + once * (1 + again) / (forward * 1e12) + 2.5 * once / (backward * 1e12)
        assert seconds == pytest.approx(expected, abs=0.006)


def test_adapters_cost_a_little() -> None:
    trained = 40 * adapter_parameters(WAN_14B, 32)
    without, with_adapters = (step_flops(WAN_14B, 2304, trained=number).linear for number in (0, trained))
    assert with_adapters / without == pytest.approx(1.017, abs=0.002)


def test_a_batch_multiplies_everything_but_the_weights() -> None:
    one, three = step_flops(WAN_14B, 2304), step_flops(WAN_14B, 2304, 3)
    assert three.total == pytest.approx(3 * one.total)


def test_fewer_text_rows_cost_less() -> None:
    sizes = replace(WAN_14B, num_layers=4)
    assert forward_flops(sizes, 1248, text_rows=128).total < forward_flops(sizes, 1248).total
