"""What a step is foretold to need, against what autograd saves and what an H100 measured."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.memory.adapters import adapter_parameters
from tests.unit.memory.kept import LATENT, held_bytes
from wanlora.memory.footprint import (
    ADAPTABLE,
    BlockMaths,
    attention_per_token,
    kept_block,
    recomputed_block,
    step_peak,
    workspace,
)
from wanlora.memory.resting import WeightFormats, block_weights, outer_weights
from wanlora.memory.saving import Save
from wanlora.models.wan.spec import TASKS, WanSizes

SIZES = WanSizes(dim=256, ffn_dim=704, num_layers=1, text_len=48)
SMALL = BlockMaths(sizes=SIZES, compiled=False, fp8=True, rank=8, text_rows=24)
WAN_14B = TASKS["t2v-14B"].sizes
GIB = 2**30
_RESULTS = Path(__file__).parents[3] / "benchmarks/results"
_RECORD: dict[str, Any] = json.loads((_RESULTS / "training-step-14B-h100.json").read_text(encoding="utf-8"))
_RECORD_KEPT: dict[str, Any] = json.loads((_RESULTS / "training-step-14B-keep-h100.json").read_text(encoding="utf-8"))
_TOKENS = {"768x768x1": 2304, "768x416x1": 1248, "768x416x21": 7488, "384x208x45": 3744}


@pytest.mark.parametrize("residual", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapted", [ADAPTABLE, ("self_attn.q", "ffn.2"), ("cross_attn.k", "ffn.0")])
def test_an_eager_block_holds_what_is_foretold(residual: torch.dtype, adapted: tuple[str, ...]) -> None:
    maths = replace(SMALL, residual=residual, adapted=adapted)
    assert _on_cpu(maths, batch=2) == pytest.approx(held_bytes(maths, batch=2), rel=0.01)


def test_an_eager_block_in_float32_holds_what_is_foretold() -> None:
    maths = replace(SMALL, compute=torch.float32)
    assert _on_cpu(maths, batch=1) == pytest.approx(held_bytes(maths), rel=0.01)


def test_an_eager_block_whose_factors_are_there_in_its_format_holds_what_is_foretold() -> None:
    maths = replace(SMALL, narrow=True)
    assert _on_cpu(maths, batch=2) == pytest.approx(held_bytes(maths, batch=2), rel=0.01)
    assert held_bytes(maths) < held_bytes(SMALL)


def test_a_text_without_padding_holds_what_is_foretold() -> None:
    maths = replace(SMALL, text_rows=SIZES.text_len)
    assert _on_cpu(maths, batch=2) == pytest.approx(held_bytes(maths, batch=2), rel=0.01)


def test_weights_that_are_not_eight_bits_wide_change_nothing() -> None:
    plain = replace(SMALL, fp8=False)
    assert held_bytes(plain) == held_bytes(SMALL)
    assert kept_block(plain, 100) == kept_block(SMALL, 100)


@pytest.mark.parametrize(
    ("save", "narrow"), [("everything", False), ("everything", True), ("products", False), ("attention", False)]
)
def test_a_compiled_block_holds_what_is_foretold(save: Save, narrow: bool) -> None:
    torch._dynamo.reset()
    maths, tokens = replace(SMALL, compiled=True, narrow=narrow), LATENT.num_tokens
    foretold = kept_block(maths, tokens, everything=save == "everything")
    if save == "attention":
        foretold = recomputed_block(maths, tokens) + tokens * attention_per_token(maths)
    assert foretold == pytest.approx(held_bytes(maths, save=save), rel=0.01)


@pytest.mark.parametrize("run", ["reference-eager", "reference", "no-swap"])
@pytest.mark.parametrize("bucket", _TOKENS)
def test_the_peak_is_that_of_a_recorded_run(run: str, bucket: str) -> None:
    """14B, fp8, rank 32 on every linear, AdamW8bit; 0 or 10 blocks swapped; compiled blocks that hold everything."""
    formats = WeightFormats(compute=torch.bfloat16, fp8=True)
    trained = WAN_14B.num_layers * adapter_parameters(WAN_14B, 32)
    on_card = WAN_14B.num_layers - (0 if run == "no-swap" else 10)
    resting = on_card * block_weights(WAN_14B, formats) + outer_weights(WAN_14B, formats) + (4 + 2) * trained
    maths = BlockMaths(sizes=WAN_14B, compiled=run != "reference-eager", fp8=True, rank=32)
    foretold = (resting + step_peak(maths, _TOKENS[bucket], everything=True, gradients=4 * trained)) / GIB
    assert foretold == pytest.approx(_RECORD["runs"][run]["buckets"][bucket]["peak_gib"], rel=0.02)


@pytest.mark.parametrize("run", ["keep", "keep-fp8-fast"])
@pytest.mark.parametrize("bucket", ["768x768x1", "768x416x1", "384x208x45"])
def test_the_peak_of_blocks_that_are_kept_is_that_of_a_recorded_run(run: str, bucket: str) -> None:
    """The same model, nothing swapped, all 40 blocks holding everything."""
    formats = WeightFormats(compute=torch.bfloat16, fp8=True, scales="rows" if "fast" in run else "scaled")
    trained = WAN_14B.num_layers * adapter_parameters(WAN_14B, 32)
    resting = WAN_14B.num_layers * block_weights(WAN_14B, formats) + outer_weights(WAN_14B, formats) + (4 + 2) * trained
    maths = BlockMaths(sizes=WAN_14B, compiled=True, fp8=True, rank=32, text_rows=128)
    peak = step_peak(maths, _TOKENS[bucket], num_kept=40, everything=True, gradients=4 * trained)
    record = _RECORD_KEPT["runs"][run]["buckets"][bucket]["peak_gib"]
    assert (resting + peak) / GIB == pytest.approx(record, rel=0.02)


def test_a_recomputed_block_holds_its_input() -> None:
    assert recomputed_block(SMALL, 100, batch=3) == 3 * 100 * 256 * 4
    assert recomputed_block(replace(SMALL, residual=torch.bfloat16), 100) == 100 * 256 * 2


def test_a_kept_block_spares_the_second_copy_of_one() -> None:
    maths = replace(SMALL, sizes=replace(SIZES, num_layers=4))
    kept, held = kept_block(maths, 1000), recomputed_block(maths, 1000)
    peaks = [step_peak(maths, 1000, num_kept=number) for number in range(5)]
    assert peaks[0] == 3 * held + kept + workspace(maths, 1000)
    assert [after - before for before, after in pairwise(peaks)] == [0] + [kept - held] * 3


def test_gradients_count_where_they_outgrow_what_blocks_hold() -> None:
    maths = replace(SMALL, sizes=replace(SIZES, num_layers=4))
    small, large = 10, 100 * GIB
    without = step_peak(maths, 1000)
    assert step_peak(maths, 1000, gradients=small) == without
    assert step_peak(maths, 1000, gradients=small, summed=small) == without + small
    at_the_end = workspace(maths, 1000) + kept_block(maths, 1000) + large
    assert step_peak(maths, 1000, gradients=large) == at_the_end
    assert step_peak(maths, 1000, gradients=large, summed=small) == at_the_end + small


def _on_cpu(maths: BlockMaths, batch: int) -> int:
    """The CPU's RMS norm widens its input to float32 before it keeps it; a card's does not."""
    widened = (4 - maths.compute.itemsize) * SIZES.dim * (2 * LATENT.num_tokens + LATENT.num_tokens + maths.text_rows)
    return kept_block(maths, LATENT.num_tokens, batch) + batch * widened
