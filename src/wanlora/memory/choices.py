"""Which settings fit a card, and which of those are foretold to be the fastest.

Swapping a block frees memory in which others keep what they computed, and costs a copy forward and one backward. Where
copies hide behind the computation, more swapped blocks than suffice can be faster; where a small size computes less
than is copied, they are not. So numbers of swapped blocks are tried, each with what every size of the data would keep
and take.

Sizes may have numbers of their own (`residency.py`). Left to itself, each would take its best. But batches come in any
order, and what a large one has driven off the card has to be copied again for the small one behind it, unless its
backward has freed the memory and had the time for that. So the numbers are bounded: none takes more than a common
bound, unless it does not fit otherwise, and the bound with which the whole data set takes least time is the one. From
there each number is changed in turn.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from wanlora.memory.cards import Card
from wanlora.memory.checkpointing import Kept
from wanlora.memory.outlook import Load, Outlook

WORTH = 0.02
"""A part of the time below this is not worth more swapped blocks, or another setting."""

_WORTH_FOR_A_SIZE = 0.005
"""The same for more swapped blocks of one size, which wait on the host in any case."""
_WORTH_OF_SIZES = 0.01
"""The same for numbers of their own."""
_WORTH_OF_TURNS = 0.002
"""The same for changing the number of each size in turn once more."""
_APART = 6
"""Of the numbers that a size is tried with then."""
Batches = Mapping[Load, int]
"""How often each size comes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Swapping:
    """A number of swapped blocks, and why it was taken."""

    number: int
    """The largest, where sizes have their own."""
    fewest: int
    """That would fit."""
    gain: float = 0.0
    """The part of the time that is foretold to be spared: of that with `fewest`, or with `alike` if there is one."""
    by_size: Mapping[Load, int] = field(default_factory=dict)
    """Where sizes have numbers of their own."""
    alike: int | None = None
    """Then: the best number if all sizes had the same."""

    def applied(self, outlook: Outlook) -> Outlook:
        """`outlook` with so many blocks swapped."""
        return replace(outlook, swapped=self.number, by_size=self.by_size)


def fits(outlook: Outlook, loads: Iterable[Load], room: int, *, besides: int = 0) -> bool:
    """Whether every batch can be trained on within `room` bytes, and `besides` bytes be taken between steps."""
    return sum(outlook.resting().values()) + besides <= room and all(outlook.peak(load) <= room for load in loads)


def fewest_swapped(outlook: Outlook, loads: Iterable[Load], room: int, *, besides: int = 0) -> int | None:
    """The smallest number of swapped blocks that satisfies `fits`; None if none does."""
    listed = list(loads)
    numbers = range(outlook.num_blocks - outlook.ring + 1)
    return next((number for number in numbers if fits(_alike(outlook, number), listed, room, besides=besides)), None)


def total_seconds(outlook: Outlook, batches: Batches, room: int, card: Card) -> float:
    """About how long all batches take in an order of chance, with as much kept as `room` bytes allow."""
    return _seconds(outlook, batches, {load: outlook.most_kept(load, room) for load in batches}, card)


def _seconds(outlook: Outlook, batches: Batches, kept: Mapping[Load, Kept], card: Card) -> float:
    """`total_seconds`, once it is known what each size keeps."""
    all_batches, left = sum(batches.values()), Counter[int]()
    for load, count in batches.items():
        left[outlook.buffers_left(load, kept[load])] += count
    taken = 0.0
    for load, count in batches.items():
        found = Counter[int]()
        for buffers, times in left.items():
            found[outlook.buffers_found(load, kept[load], buffers)] += times
        taken += sum(
            count * times / all_batches * outlook.seconds(load, card, kept=kept[load], before=buffers)
            for buffers, times in found.items()
        )
    return taken


def best_swapped(
    outlook: Outlook, batches: Batches, room: int, card: Card | None, *, besides: int = 0, host: int | None = None
) -> Swapping | None:
    """The numbers of swapped blocks with which all batches take least time; None if none fit.

    Less than `WORTH` is nothing: then fewer blocks are swapped. More than the fewest are swapped only if swapped blocks
    and offloaded inputs take at most `host` bytes of system memory, and only on a `card` whose rates are known. Sizes
    have numbers of their own where that is worth it, and where steps are not on several batches, of any sizes.
    """
    fewest = fewest_swapped(outlook, batches, room, besides=besides)
    if fewest is None or card is None:
        return None if fewest is None else Swapping(number=fewest, fewest=fewest)
    tried = [_alike(outlook, number) for number in range(fewest, outlook.num_blocks - outlook.ring + 1)]
    possible = [one for one in tried if one.swapped == fewest or host is None or host_bytes(one, batches) <= host]
    seconds = {one.swapped: total_seconds(one, batches, room, card) for one in possible}
    enough = min(seconds.values()) / (1 - WORTH)
    number = next(number for number, taken in seconds.items() if taken <= enough)
    gain = 1 - seconds[number] / seconds[fewest] if number > fewest else 0
    alike = Swapping(number=number, fewest=fewest, gain=gain)
    if len(batches) == 1 or outlook.accumulates:
        return alike
    # Blocks of plain autograd that wait on the host are recomputed for all sizes, so no more are to wait.
    most = possible[-1].swapped if outlook.maths.compiled else number
    least = min(seconds, key=lambda number: seconds[number])
    return _by_size(outlook, batches, room, card, most=most, alike=replace(alike, number=least)) or alike


def _alike(outlook: Outlook, number: int) -> Outlook:
    """So many blocks swapped for every size."""
    return replace(outlook, swapped=number, by_size={})


def _by_size(outlook: Outlook, batches: Batches, room: int, card: Card, most: int, alike: Swapping) -> Swapping | None:
    """Numbers of their own up to `most`; None if that spares too little of the time with the best one for all."""
    fewest, best = {}, {}
    for load in batches:
        fewest[load], best[load] = _best_for(replace(outlook, swapped=most), load, room, card)
    known: dict[tuple[Load, int, int], Kept] = {}

    def swapping(numbers: Mapping[Load, int]) -> Swapping:
        return Swapping(number=max(alike.fewest, *numbers.values()), fewest=alike.fewest, by_size=dict(numbers))

    def seconds(numbers: Mapping[Load, int]) -> float:
        tried = swapping(numbers).applied(outlook)
        keys = {load: (load, number, tried.optional) for load, number in numbers.items()}
        known.update({key: tried.most_kept(load, room) for load, key in keys.items() if key not in known})
        return _seconds(tried, batches, {load: known[key] for load, key in keys.items()}, card)

    bounds = range(max(best.values()) + 1)
    bounded = ({load: min(best[load], max(bound, fewest[load])) for load in batches} for bound in bounds)
    numbers = _tuned(min(bounded, key=seconds), fewest, most, seconds)
    compared = total_seconds(_alike(outlook, alike.number), batches, room, card)
    gain = 1 - seconds(numbers) / compared
    return replace(swapping(numbers), gain=gain, alike=alike.number) if gain > _WORTH_OF_SIZES else None


def _tuned(
    numbers: Mapping[Load, int], fewest: Mapping[Load, int], most: int, seconds: Callable[[Mapping[Load, int]], float]
) -> Mapping[Load, int]:
    """The numbers, each changed in turn, by a little and by a lot, for as long as that is worth it."""
    taken = seconds(numbers)
    while True:
        before = taken
        for load in sorted(numbers, key=lambda load: load.tokens):
            tried = [{**numbers, load: number} for number in (*range(fewest[load], most, _APART), most)]
            tried += [{**numbers, load: min(max(numbers[load] + more, fewest[load]), most)} for more in (-1, 1)]
            numbers = min((numbers, *tried), key=seconds)
        taken = seconds(numbers)
        if taken > (1 - _WORTH_OF_TURNS) * before:
            return numbers


def _best_for(outlook: Outlook, load: Load, room: int, card: Card) -> tuple[int, int]:
    """The fewest swapped blocks with which such a batch fits, and the number with which a run of such batches alone
    takes least time."""
    tried = [replace(outlook, by_size={load: number}) for number in range(outlook.swapped + 1)]
    seconds = {
        one.by_size[load]: one.seconds(load, card, kept=one.most_kept(load, room))
        for one in tried
        if one.peak(load) <= room
    }
    enough = min(seconds.values()) / (1 - _WORTH_FOR_A_SIZE)
    return min(seconds), next(number for number, taken in seconds.items() if taken <= enough)


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
            found |= _named(flags, outlook, candidate)
        elif choice := best_swapped(candidate, batches, room, card, host=host):
            found |= _named(flags, outlook, choice.applied(candidate))

    def order(entry: tuple[str, Outlook]) -> float:
        return entry[1].swapped if card is None else total_seconds(entry[1], batches, room, card)

    return dict(sorted(found.items(), key=order))


def faster(
    outlook: Outlook, batches: Batches, room: int, card: Card, *, besides: int = 0, host: int | None = None
) -> dict[str, float]:
    """Settings that fit and are foretold to be worth their while, by the flags to type, with the part of the time that
    they spare: other numbers of swapped blocks, and inputs of recomputed blocks on the host if that spares more."""
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
        changed = choice.applied(candidate)
        seconds = total_seconds(changed, batches, room, card)
        if seconds > (1 - WORTH) * best or (host is not None and host_bytes(changed, batches) > host):
            continue
        best = seconds
        found |= dict.fromkeys(_named(flags, outlook, changed), 1 - seconds / present)
    return found


def _named(flags: str, outlook: Outlook, changed: Outlook) -> dict[str, Outlook]:
    """What `outlook` is changed to, by all flags that lead to it; nothing if there are none."""
    same = (changed.swapped, changed.by_size) == (outlook.swapped, outlook.by_size)
    swap = "" if same else f"--blocks_to_swap {'auto' if changed.by_size else changed.swapped}"
    name = " ".join(part for part in (flags, swap) if part)
    return {name: changed} if name else {}


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
