"""Cards that people train on, and how long a step takes on one: an estimate before anything was measured.

Memory is what PyTorch reports (GiB that a program can have on Linux with ECC as delivered, rounded down). Rates are
the makers' for dense bf16 and fp8 products summed in float32, in TFLOP/s; GeForce cards sum so at half the rate that
their adverts give. A step reaches only part of them. The parts were fitted to the 14B model on an H100
(benchmarks/results/training-step-14B-h100.json, within 4 %) and are taken to hold on other cards.
"""

import re
from dataclasses import dataclass, replace

import torch

from wanlora.foundation.errors import ConfigError, did_you_mean
from wanlora.memory.work import Work


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """What a card has and can do at best."""

    name: str
    memory: float
    """GiB of its own."""
    bf16: float
    """TFLOP/s."""
    fp8: float | None
    """TFLOP/s; None where it has no fp8 units."""
    bandwidth: int
    """GB/s of its own memory."""
    link: float
    """GB/s from page-locked system memory."""


_GEN3, _GEN4_X8, _GEN4, _GEN5_X8, _GEN5 = 12.0, 12.5, 25.0, 25.0, 50.0
_ROWS: tuple[tuple[str, float, float, float | None, int, float], ...] = (
    ("RTX 3060", 11.7, 25.6, None, 360, _GEN4),
    ("RTX 3080", 9.7, 59.5, None, 760, _GEN4),
    ("RTX 3080 Ti", 11.7, 68.2, None, 912, _GEN4),
    ("RTX 3090", 23.6, 71.0, None, 936, _GEN4),
    ("RTX 3090 Ti", 23.6, 80.0, None, 1008, _GEN4),
    ("RTX 4060 Ti 16GB", 15.6, 44.1, 88.2, 288, _GEN4_X8),
    ("RTX 4070", 11.6, 58.3, 116.6, 504, _GEN4),
    ("RTX 4070 Super", 11.6, 71.0, 141.9, 504, _GEN4),
    ("RTX 4070 Ti Super", 15.6, 88.2, 176.4, 672, _GEN4),
    ("RTX 4080", 15.6, 97.5, 194.9, 717, _GEN4),
    ("RTX 4080 Super", 15.6, 104.4, 208.8, 736, _GEN4),
    ("RTX 4090", 23.6, 165.2, 330.3, 1008, _GEN4),
    ("RTX 5060 Ti 16GB", 15.4, 47.4, 94.9, 448, _GEN5_X8),
    ("RTX 5070", 11.5, 61.7, 123.5, 672, _GEN5),
    ("RTX 5070 Ti", 15.4, 87.9, 175.8, 896, _GEN5),
    ("RTX 5080", 15.4, 112.6, 225.1, 960, _GEN5),
    ("RTX 5090", 31.3, 209.5, 419.0, 1792, _GEN5),
    ("RTX A5000", 23.6, 111.1, None, 768, _GEN4),
    ("RTX A6000", 47.4, 154.8, None, 768, _GEN4),
    ("RTX 6000 Ada", 47.4, 364.2, 728.5, 960, _GEN4),
    ("RTX PRO 6000", 94.9, 503.8, 1007.6, 1792, _GEN5),
    ("L4", 21.9, 121.0, 242.0, 300, _GEN4),
    ("L40S", 44.3, 362.0, 733.0, 864, _GEN4),
    ("A40", 44.3, 149.7, None, 696, _GEN4),
    ("A100 40GB", 39.3, 312.0, None, 1555, _GEN4),
    ("A100 80GB", 79.1, 312.0, None, 2039, _GEN4),
    ("H100", 79.1, 989.0, 1979.0, 3350, _GEN5),
    ("H100 PCIe", 79.1, 756.0, 1513.0, 2000, _GEN5),
    ("H200", 139.7, 989.0, 1979.0, 4800, _GEN5),
    ("B200", 178.3, 2250.0, 4500.0, 8000, _GEN5),
)
CARDS: dict[str, Card] = {
    name: Card(name=name, memory=memory, bf16=bf16, fp8=fp8, bandwidth=bandwidth, link=link)
    for name, memory, bf16, fp8, bandwidth, link in _ROWS
}

_REACHED_BF16, _REACHED_FP8, _REACHED_ATTENTION, _REACHED_BANDWIDTH = 0.795, 0.70, 0.50, 0.90
"""The part of the rates that products in bf16, in fp8 and those of attention reach, and of the memory's bandwidth."""
_KERNEL = 4e-6
"""Seconds of a kernel in which most of the card is idle: its beginning and its end."""


def find_card(name: str) -> Card:
    """The card that a user calls `name`: `RTX 4090`, `4090`, `a100 80gb`. Raises `ConfigError` naming those known."""
    words = _words(name)
    fitting = [card for card in CARDS.values() if words and words <= _words(card.name)]
    exact = [card for card in fitting if words == _words(card.name)]
    shortest = min((len(_words(card.name)) for card in fitting), default=0)
    chosen = exact or [card for card in fitting if len(_words(card.name)) == shortest]
    if len(chosen) == 1:
        return chosen[0]
    if chosen:
        raise ConfigError(f"--card {name} may be {' or '.join(card.name for card in chosen)}; type the whole name")
    raise ConfigError(
        f"--card {name} is not known{did_you_mean(name, {card.lower(): card for card in CARDS})}; known: "
        f"{', '.join(CARDS)}. For another one give its memory: --vram 24"
    )


def recognise_card(device_name: str) -> Card | None:
    """The card whose driver calls itself `device_name` (`NVIDIA H100 80GB HBM3`), or None. Laptops' are other cards."""
    words = _words(device_name)
    fitting = [card for card in CARDS.values() if _without_size(_words(card.name)) <= words and "laptop" not in words]
    return max(fitting, key=lambda card: len(_words(card.name) & words), default=None)


def work_seconds(card: Card, work: Work, *, fp8_products: bool = False) -> float:
    """About how long a card takes over `work`. `fp8_products`: frozen layers multiply in fp8, where it can."""
    fast = card.fp8 if fp8_products else None
    rate = card.bf16 * _REACHED_BF16 if fast is None else fast * _REACHED_FP8
    products = work.linear / rate + work.attention / (card.bf16 * _REACHED_ATTENTION)
    return products / 1e12 + work.moved / (card.bandwidth * _REACHED_BANDWIDTH * 1e9) + work.kernels * _KERNEL


def copy_seconds(card: Card, num_bytes: float) -> float:
    """About how long so many bytes take from or to page-locked system memory."""
    return num_bytes / (card.link * 1e9)


def detect_card(device: torch.device) -> Card | None:
    """The CUDA card at `device` if its rates are known, with the memory that it reports."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    known = recognise_card(properties.name)
    return replace(known, memory=properties.total_memory / 2**30) if known else None


def _without_size(words: frozenset[str]) -> frozenset[str]:
    """Drivers leave the size of the memory out of most names."""
    return frozenset(word for word in words if not re.fullmatch(r"\d+gb", word))


def _words(name: str) -> frozenset[str]:
    """Letters and digits apart where the makers' spelling varies: `RTX4090`, `rtx 4090`."""
    text = re.sub(r"rtx(?=[a-z0-9])", "rtx ", name.lower().replace(" gb", "gb"))
    return frozenset(re.findall(r"[a-z0-9]+", text)) - {"nvidia", "geforce"}
