"""The table of cards, and the times that its rates lead to."""

from typing import Any

import pytest
import torch

from wanlora.foundation.errors import ConfigError
from wanlora.memory.cards import CARDS, copy_seconds, detect_card, find_card, recognise_card, work_seconds
from wanlora.memory.work import Work


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


def test_each_kind_of_work_has_its_own_rate() -> None:
    card = CARDS["RTX 3090"]
    works = (Work(linear=1e14), Work(attention=1e14), Work(moved=1e12), Work(kernels=1e5))
    times = [work_seconds(card, work) for work in works]
    assert times == pytest.approx([1e14 / 71e12 / 0.795, 1e14 / 71e12 / 0.5, 1e12 / 936e9 / 0.9, 0.4])
    assert work_seconds(card, sum(works, Work())) == pytest.approx(sum(times))
    assert copy_seconds(card, 50e9) == pytest.approx(2.0)


def test_fp8_products_help_only_where_the_card_has_them() -> None:
    work = Work(linear=1e14, attention=1e13)
    old, new = CARDS["RTX 3090"], CARDS["RTX 4090"]
    assert work_seconds(old, work, fp8_products=True) == work_seconds(old, work)
    assert work_seconds(new, work, fp8_products=True) < work_seconds(new, work)
