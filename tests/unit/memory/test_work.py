"""What a block costs, against what was recorded on a card."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from wanlora.memory.cards import CARDS, work_seconds
from wanlora.memory.flops import step_flops
from wanlora.memory.footprint import BlockMaths
from wanlora.memory.work import Saved, Work, block_work
from wanlora.models.wan.spec import TASKS

RESULTS = Path(__file__).parents[3] / "benchmarks/results"
WAN_14B = TASKS["t2v-14B"].sizes
MATHS = BlockMaths(sizes=WAN_14B, fp8=True, rank=32, text_rows=128)
TOKENS = {"768x768x1": 2304, "768x416x1": 1248, "768x416x21": 7488, "384x208x45": 3744}
OPTIMIZER = 0.063
"""Seconds of AdamW8bit in runs of the time when it was given 800 matrices one by one (docs/log.md)."""


def recorded(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def block_seconds(maths: BlockMaths, tokens: int, saved: Saved, *, fp8_products: bool = False) -> float:
    passes = block_work(maths, tokens, saved=saved, fp8_products=fp8_products)
    return sum(work_seconds(CARDS["H100"], work, fp8_products=fp8_products) for work in passes)


@pytest.mark.parametrize("bucket", TOKENS)
@pytest.mark.parametrize(
    ("name", "saved", "fp8_products"),
    [
        ("block-step-14B-fp8-fast-h100", "products", True),
        ("block-step-14B-fp8-fast-everything-h100", "everything", True),
        ("block-step-14B-bf16-maths-h100", "products", False),
    ],
)
def test_the_kernels_of_a_block_took_about_as_long_as_is_estimated(
    name: str, saved: Saved, fp8_products: bool, bucket: str
) -> None:
    (block,) = (block for block in recorded(name)["blocks"] if block["bucket"] == bucket)
    estimated = block_seconds(MATHS, block["tokens"], saved, fp8_products=fp8_products)
    assert 1000 * estimated == pytest.approx(sum(block["kinds_ms"].values()), rel=0.05)


@pytest.mark.parametrize(("saved", "field"), [("attention", "attention_ms"), ("nothing", "recomputed_ms")])
@pytest.mark.parametrize(("maths", "fp8_products"), [("fp8-fast", True), ("bf16-maths", False)])
def test_a_large_block_that_is_computed_again_took_about_as_long_as_is_estimated(
    maths: str, fp8_products: bool, saved: Saved, field: str
) -> None:
    (block,) = (one for one in recorded(f"block-step-14B-{maths}-h100")["blocks"] if one["tokens"] == 7488)
    estimated = block_seconds(MATHS, 7488, saved, fp8_products=fp8_products)
    assert 1000 * estimated == pytest.approx(block[field], rel=0.05)


@pytest.mark.parametrize(("run", "compiled"), [("reference-eager", False), ("no-swap", True)])
@pytest.mark.parametrize("bucket", TOKENS)
def test_a_recorded_step_took_about_as_long_as_is_estimated(run: str, compiled: bool, bucket: str) -> None:
    step = recorded("training-step-14B-h100")["runs"][run]["buckets"][bucket]["seconds"]
    estimated = 40 * block_seconds(replace(MATHS, compiled=compiled), TOKENS[bucket], "nothing")
    assert estimated + OPTIMIZER == pytest.approx(step, rel=0.05)


@pytest.mark.parametrize("saved", ["products", "nothing", "attention"])
def test_work_holds_the_arithmetic_that_is_counted_elsewhere(saved: Saved) -> None:
    blocks = 40
    recomputed = 0 if saved == "products" else blocks
    attention = blocks if saved == "attention" else 0
    flops = step_flops(WAN_14B, 3744, 2, text_rows=128, recomputed=recomputed, attention_kept=attention)
    work = sum(block_work(MATHS, 3744, 2, saved=saved), Work())
    assert blocks * work.attention == pytest.approx(flops.attention)
    assert blocks * work.linear == pytest.approx(flops.linear, rel=0.001)


def test_a_block_takes_longer_the_less_it_keeps() -> None:
    kinds: tuple[Saved, ...] = ("everything", "products", "attention", "nothing")
    for tokens in TOKENS.values():
        times = [block_seconds(MATHS, tokens, saved) for saved in kinds]
        assert times == sorted(times) and len(set(times)) == len(times)


def test_weights_are_widened_or_transposed_unless_they_are_there_so() -> None:
    weights = 8 * 5120**2 + 2 * 5120 * 13824

    def moved(maths: BlockMaths, fp8_products: bool = False, transposed: bool = False) -> float:
        return sum(block_work(maths, 1248, fp8_products=fp8_products, transposed=transposed), Work()).moved

    plain = moved(replace(MATHS, fp8=False))
    assert moved(MATHS) - plain == pytest.approx(2 * 3 * weights)
    assert moved(MATHS, fp8_products=True) - plain == pytest.approx(2 * weights)
    assert moved(MATHS, fp8_products=True, transposed=True) == pytest.approx(plain)
