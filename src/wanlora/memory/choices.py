"""Which settings fit a card, and which of those are foretold to be the fastest.

Swapping a block frees memory in which others keep what they computed, and costs a copy forward and one backward. Where
copies hide behind the computation, more swapped blocks than suffice can be faster; where a small size computes less
than is copied, they are not. So numbers of swapped blocks are tried, each with what every size of the data would keep
and take, and the whole data set decides.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from wanlora.memory.cards import Card
from wanlora.memory.outlook import Load, Outlook

WORTH = 0.02
"""A part of the time below this is not worth more swapped blocks, or another setting."""

Batches = Mapping[Load, int]
"""How often each size comes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Swapping:
    """A number of swapped blocks, and why it was taken."""

    number: int
    fewest: int
    """That would fit."""
    gain: float = 0.0
    """The part of the time of `fewest` that `number` is foretold to spare."""


def fits(outlook: Outlook, loads: Iterable[Load], room: int, *, besides: int = 0) -> bool:
    """Whether every batch can be trained on within `room` bytes, and `besides` bytes be taken between steps."""
    return sum(outlook.resting().values()) + besides <= room and all(outlook.peak(load) <= room for load in loads)


def fewest_swapped(outlook: Outlook, loads: Iterable[Load], room: int, *, besides: int = 0) -> int | None:
    """The smallest number of swapped blocks that satisfies `fits`; None if none does."""
    listed = list(loads)
    numbers = range(outlook.num_blocks - outlook.ring + 1)
    return next(
        (number for number in numbers if fits(replace(outlook, swapped=number), listed, room, besides=besides)), None
    )


def total_seconds(outlook: Outlook, batches: Batches, room: int, card: Card) -> float:
    """About how long all batches take, with as much kept as `room` bytes allow."""
    times = {load: outlook.seconds(load, card, kept=outlook.most_kept(load, room)) for load in batches}
    return sum(count * times[load] for load, count in batches.items())


def best_swapped(
    outlook: Outlook, batches: Batches, room: int, card: Card | None, *, besides: int = 0, host: int | None = None
) -> Swapping | None:
    """The number of swapped blocks with which all batches take least time; None if no number fits.

    Less than `WORTH` is nothing: then fewer blocks are swapped. More than the fewest are swapped only if swapped blocks
    and offloaded inputs take at most `host` bytes of system memory, and only on a `card` whose rates are known.
    """
    fewest = fewest_swapped(outlook, batches, room, besides=besides)
    if fewest is None or card is None:
        return None if fewest is None else Swapping(number=fewest, fewest=fewest)
    tried = [replace(outlook, swapped=number) for number in range(fewest, outlook.num_blocks - outlook.ring + 1)]
    possible = [one for one in tried if one.swapped == fewest or host is None or host_bytes(one, batches) <= host]
    seconds = {one.swapped: total_seconds(one, batches, room, card) for one in possible}
    enough = min(seconds.values()) / (1 - WORTH)
    number = next(number for number, taken in seconds.items() if taken <= enough)
    return Swapping(number=number, fewest=fewest, gain=1 - seconds[number] / seconds[fewest] if number > fewest else 0)


def host_bytes(outlook: Outlook, loads: Iterable[Load]) -> int:
    """Bytes of system memory that swapped blocks and offloaded inputs take, page-locked."""
    return outlook.host + max(map(outlook.offloaded, loads), default=0)


def cures(
    outlook: Outlook, batches: Batches, room: int, card: Card | None = None, *, host: int | None = None
) -> dict[str, Outlook]:
    """Settings with which every batch fits into `room` bytes, by the flags to type: the fastest on `card` first, or
    those that swap least where its rates are not known."""
    found: dict[str, Outlook] = {}
    for flags, candidate in _changes(outlook).items():
        if card is None and fits(candidate, batches, room):
            found |= _named(flags, outlook, candidate, candidate.swapped)
        elif choice := best_swapped(candidate, batches, room, card, host=host):
            found |= _named(flags, outlook, candidate, choice.number)

    def order(entry: tuple[str, Outlook]) -> float:
        return entry[1].swapped if card is None else total_seconds(entry[1], batches, room, card)

    return dict(sorted(found.items(), key=order))


def faster(
    outlook: Outlook, batches: Batches, room: int, card: Card, *, besides: int = 0, host: int | None = None
) -> dict[str, float]:
    """Settings that fit and are foretold to be worth their while, by the flags to type, with the part of the time that
    they spare: another number of swapped blocks, and inputs of recomputed blocks on the host if that spares more."""
    present = best = total_seconds(outlook, batches, room, card)
    found: dict[str, float] = {}
    offload = "--gradient_checkpointing_cpu_offload"
    changes = {"": outlook}
    if outlook.recompute and not outlook.offload:
        changes[offload] = replace(outlook, offload=True)
    for flags, candidate in changes.items():
        choice = best_swapped(candidate, batches, room, card, besides=besides, host=host)
        if choice is None:
            continue
        changed = replace(candidate, swapped=choice.number)
        seconds = total_seconds(changed, batches, room, card)
        if seconds > (1 - WORTH) * best or (host is not None and host_bytes(changed, batches) > host):
            continue
        best = seconds
        found |= dict.fromkeys(_named(flags, outlook, candidate, choice.number), 1 - seconds / present)
    return found


def _named(flags: str, outlook: Outlook, candidate: Outlook, number: int) -> dict[str, Outlook]:
    """A candidate with so many blocks swapped, by all flags that lead to it; nothing if there are none."""
    swap = "" if number == outlook.swapped else f"--blocks_to_swap {number}"
    name = " ".join(part for part in (flags, swap) if part)
    return {name: replace(candidate, swapped=number)} if name else {}


def _changes(outlook: Outlook) -> Mapping[str, Outlook]:
    """What may be changed, alone and together, by the flags to type."""
    changes = {"": outlook}
    if outlook.transposed:
        outlook = replace(outlook, transposed=False)
        changes = {"--fp8_fast_transposed off": outlook}
    if not outlook.recompute:
        flags = next(iter(changes))
        changes[f"{flags} --gradient_checkpointing".strip()] = replace(outlook, recompute=True)
    if not outlook.maths.fp8:
        maths, formats = replace(outlook.maths, fp8=True), replace(outlook.formats, fp8=True)
        for flags, changed in list(changes.items()):
            changes[f"--fp8_base --fp8_scaled {flags}".strip()] = replace(changed, maths=maths, formats=formats)
    if not outlook.offload:
        flags, changed = list(changes.items())[-1]
        if changed.recompute:
            changes[f"{flags} --gradient_checkpointing_cpu_offload".strip()] = replace(changed, offload=True)
    return changes
