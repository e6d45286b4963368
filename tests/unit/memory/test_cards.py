"""The table of cards, and the time of a step that it leads to."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.memory.adapters import adapter_parameters
from wanlora.foundation.errors import ConfigError
from wanlora.memory.cards import CARDS, detect_card, find_card, recognise_card, step_seconds
from wanlora.memory.flops import Flops, step_flops
from wanlora.models.wan.spec import TASKS

WAN_14B = TASKS["t2v-14B"].sizes
_RECORD: dict[str, Any] = json.loads(
    (Path(__file__).parents[3] / "benchmarks/results/training-step-14B-h100.json").read_text(encoding="utf-8")
)
_TOKENS = {"768x768x1": 2304, "768x416x1": 1248, "768x416x21": 7488, "384x208x45": 3744}


@pytest.mark.parametrize("card", CARDS.values(), ids=str)
def test_every_card_is_found_by_its_name_and_by_its_drivers(card: Any) -> None:
    assert find_card(card.name) is card
    assert find_card(card.name.lower().replace("rtx ", "rtx")) is card
    assert recognise_card(f"NVIDIA GeForce {card.name} Generation") is card
    assert card.fp8 is None or card.fp8 >= 1.9 * card.bf16


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 3090", "RTX 3090"),
        ("3090 ti", "RTX 3090 Ti"),
        ("a100 80 GB", "A100 80GB"),
    ],
)
def test_a_card_may_be_named_in_short(typed: str, name: str) -> None:
    assert find_card(typed).name == name


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA GeForce RTX 4060 Ti", "RTX 4060 Ti 16GB"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "RTX 4070 Ti Super"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
    ],
)
def test_drivers_names_are_recognised(device: str, name: str) -> None:
    card = recognise_card(device)
    assert card is not None and card.name == name


def test_a_laptops_card_is_not_taken_for_its_namesake() -> None:
    assert recognise_card("NVIDIA GeForce RTX 4090 Laptop GPU") is None
    assert detect_card(torch.device("cpu")) is None


@pytest.mark.parametrize("typed", ["a100", "rtx 6000", "Radeon", ""])
def test_a_name_that_is_not_clear_is_refused(typed: str) -> None:
    with pytest.raises(ConfigError, match=r"A100 80GB|RTX 6000 Ada"):
        find_card(typed)


@pytest.mark.parametrize(("run", "compiled"), [("reference-eager", False), ("reference", True), ("no-swap", True)])
@pytest.mark.parametrize("bucket", _TOKENS)
def test_a_recorded_step_took_about_as_long_as_is_estimated(run: str, compiled: bool, bucket: str) -> None:
    flops = step_flops(WAN_14B, _TOKENS[bucket], trained=40 * adapter_parameters(WAN_14B, 32))
    widened = 3 * 40 * (0.373e9 + 2 * 0.703e9)
    copied = 0 if run == "no-swap" else 20 * 0.373e9
    estimated = step_seconds(CARDS["H100"], flops, widened=widened, copied=copied, compiled=compiled)
    assert estimated == pytest.approx(_RECORD["runs"][run]["buckets"][bucket]["seconds"], rel=0.1)


def test_copies_decide_where_they_take_longer() -> None:
    card, flops = CARDS["RTX 3090"], Flops(linear=1e12, attention=0.0)
    assert step_seconds(card, flops, copied=50e9) == pytest.approx(2.0)
    assert step_seconds(card, flops, copied=1e6) == step_seconds(card, flops)


def test_fp8_products_help_only_where_the_card_has_them() -> None:
    flops = Flops(linear=1e14, attention=1e13)
    old, new = CARDS["RTX 3090"], CARDS["RTX 4090"]
    assert step_seconds(old, flops, fp8_products=True) == step_seconds(old, flops)
    assert step_seconds(new, flops, fp8_products=True) < step_seconds(new, flops)
