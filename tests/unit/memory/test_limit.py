"""What a run may take of a card."""

import platform
import sys

import pytest
import torch

from wanlora.foundation.errors import MemoryPlanError
from wanlora.memory.host import available_host_memory
from wanlora.memory.limit import CardLimit, default_reserve, driver_spills, free_for_tensors, limit_card
from wanlora.memory.measure import GIB


def card(**changes: int | bool | None) -> CardLimit:
    known = {"total": 24 * GIB, "others": 2 * GIB, "reserve": GIB // 2}
    return CardLimit(**{**known, **changes})  # type: ignore[arg-type]


def test_what_others_use_and_the_reserve_are_left_alone() -> None:
    assert card().reserved == 21.5 * GIB
    assert card(at_most=16 * GIB).reserved == 16 * GIB
    assert card(at_most=23 * GIB).reserved == 21.5 * GIB
    assert card(others=24 * GIB).reserved == 0


def test_fragments_are_expected_to_cost_less_where_segments_expand() -> None:
    assert card().allocated == int(0.94 * card().reserved)
    assert card(expandable=True).allocated == int(0.98 * card().reserved)


def test_the_figures_are_told() -> None:
    assert str(card(at_most=16 * GIB, expandable=True)) == (
        "24.0 GiB on the card, 2.0 in use already; this run takes at most 16.0 (--vram_limit 16, --vram_reserve 0.5, "
        "expandable segments)"
    )


@pytest.mark.parametrize(
    ("system", "release", "spills"),
    [
        ("linux", "6.8.0-45-generic", False),
        ("linux", "5.15.153.1-microsoft-standard-WSL2", True),
        ("win32", "11", True),
    ],
)
def test_more_is_left_free_where_the_driver_would_spill(
    system: str, release: str, spills: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = platform.uname()._replace(release=release)
    monkeypatch.setattr(platform, "uname", lambda: names)
    monkeypatch.setattr(sys, "platform", system)
    assert driver_spills() == spills
    assert default_reserve() == (1.0 if spills else 0.5)


class Driver:
    """A card as CUDA would tell of it, and what is asked of the allocator."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, free: int) -> None:
        self.fractions: list[tuple[float, int]] = []
        self.settings: list[str] = []
        for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr("wanlora.memory.limit.driver_spills", lambda: False)
        monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", self.settings.append, raising=False)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda card: (free, 24 * GIB))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda card: GIB)
        monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", self._set)

    def _set(self, fraction: float, card: int) -> None:
        assert isinstance(card, int)  # a device without a number is refused
        self.fractions.append((fraction, card))


@pytest.mark.parametrize(("name", "card"), [("cuda", 3), ("cuda:1", 1)])
def test_the_allocator_is_held_below_what_is_free(name: str, card: int, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(monkeypatch, free=21 * GIB)
    limit = limit_card(torch.device(name), reserve=1.0, at_most=None)
    assert limit is not None and limit.others == 2 * GIB and limit.expandable
    assert driver.fractions == [(21 / 24, card)] and driver.settings == ["expandable_segments:True"]


def test_flags_that_a_command_lacks_are_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    Driver(monkeypatch, free=20 * GIB)
    limit = limit_card(torch.device("cuda"), reserve=None, at_most=None, adjustable=False)
    assert str(limit).endswith("this run takes at most 20.5 (0.5 left free, expandable segments)")
    Driver(monkeypatch, free=-GIB)
    with pytest.raises(MemoryPlanError) as error:
        limit_card(torch.device("cuda"), reserve=None, at_most=None, adjustable=False)
    assert "--vram" not in str(error.value)


@pytest.mark.parametrize(("fraction", "reachable"), [(1.0, 6.0), (0.25, 5.0)])
def test_tensors_get_what_is_free_and_allowed(
    fraction: float, reachable: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    Driver(monkeypatch, free=6 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda card: GIB)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda card: fraction)
    assert free_for_tensors(torch.device("cuda:0")) == int(0.94 * reachable * GIB)
    assert free_for_tensors(torch.device("cpu")) is None


def test_an_allocator_that_the_user_has_set_up_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(monkeypatch, free=20 * GIB)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:512")
    limit = limit_card(torch.device("cuda"), reserve=None, at_most=8.0)
    assert limit is not None and not limit.expandable and driver.settings == []
    assert driver.fractions == [(8 / 24, 3)]


def test_a_card_that_others_fill_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    Driver(monkeypatch, free=-GIB // 2)
    with pytest.raises(MemoryPlanError, match=r"nothing is left of the card's memory.*nvidia-smi"):
        limit_card(torch.device("cuda"), reserve=0.5, at_most=None)


def test_without_a_card_there_is_no_limit() -> None:
    assert limit_card(torch.device("cpu"), reserve=None, at_most=8.0) is None


def test_the_system_says_how_much_memory_is_free() -> None:
    free = available_host_memory()
    assert free is None or 2**26 < free < 2**50
