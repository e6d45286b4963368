"""What is to be done: every cache file that is asked for, and why it has to be made.

A rerun costs what has changed. The usual test is whether a file is there, which keeps latents of last week's
resolution; here each file is compared with what is asked of it, and the reasons are counted before any work begins.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from wanlora.caching.requests import Request
from wanlora.data.items import Item
from wanlora.data.sources import some
from wanlora.foundation.errors import DataError, Problems
from wanlora.foundation.log import log

MISSING = "is missing"
"""The reason of a file that is not there, as the cache format words it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One cache file."""

    path: Path
    item: Item
    """A sample that needs it; the others that do need the same content."""
    requests: tuple[int, ...]
    """Numbers of the dataset files that ask for it."""
    reason: str | None
    """Why it has to be made; None if it is as it should be."""


@dataclass(kw_only=True, slots=True)
class Tally:
    """How one dataset file fared."""

    path: Path
    asked: int = 0
    fresh: int = 0
    encoded: int = 0
    failed: int = 0
    problem: str = ""
    """Why nothing of it was done."""


@dataclass(kw_only=True, slots=True)
class Summary:
    """How a caching run went."""

    tallies: list[Tally]
    problems: list[str] = field(default_factory=list)
    """What could not be cached, one sentence per source."""
    written: int = 0
    """Cache files written; several dataset files may ask for the same one."""

    @classmethod
    def of(cls, requests: Sequence[Request]) -> "Summary":
        """Nothing done yet."""
        return cls(tallies=[Tally(path=request.path, problem=request.problem) for request in requests])

    def done(self, task: Task) -> None:
        """A cache file was written."""
        self.written += 1
        for number in task.requests:
            self.tallies[number].encoded += 1

    def failed(self, tasks: Sequence[Task], why: str) -> None:
        """Cache files could not be made."""
        self.problems.append(why)
        for number in (number for task in tasks for number in task.requests):
            self.tallies[number].failed += 1

    def lines(self) -> Iterator[str]:
        """A table: a line for each dataset file."""
        width = max(len(str(tally.path)) for tally in self.tallies)
        yield f"{'dataset file':<{width}}  {'asked':>7}  {'kept':>7}  {'encoded':>7}  {'failed':>7}"
        for tally in self.tallies:
            numbers = "  ".join(f"{n:>7}" for n in (tally.asked, tally.fresh, tally.encoded, tally.failed))
            yield f"{tally.path!s:<{width}}  " + ("left out: its data are at fault" if tally.problem else numbers)

    def finish(self) -> None:
        """Say how it went. Raises `DataError` if something could not be cached, so that scripts can tell."""
        for line in self.lines():
            log.info(line)
        problems = Problems()
        for message in (*(tally.problem for tally in self.tallies if tally.problem), *self.problems):
            problems.add(message)
        problems.raise_all(DataError)


@contextmanager
def writing(task: Task, summary: Summary) -> Iterator[None]:
    """Count a file that is written inside, or name the one that holds impossible values.

    Raises `DataError` if the disk refuses it: then nothing more can be done.
    """
    try:
        yield
    except DataError as error:
        log.error(str(error))
        summary.failed([task], str(error))
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"{task.path} cannot be written ({reason}); free or mend the disk and run again") from error
    else:
        summary.done(task)


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """Every cache file of every dataset file, each once."""

    tasks: tuple[Task, ...]
    summary: Summary

    @property
    def to_do(self) -> tuple[Task, ...]:
        """What has to be made."""
        return tuple(task for task in self.tasks if task.reason is not None)

    def announce(self, what: str) -> None:
        """Say how much there is to do, and why."""
        counts = Counter(_in_general(task) for task in self.to_do)
        if not counts:
            log.info(f"all {len(self.tasks)} {what} are there and up to date; nothing is encoded")
            return
        reasons = ", ".join(f"{count} {'missing' if reason == MISSING else 'stale'}" for reason, count in _two(counts))
        log.info(f"encode {len(self.to_do)} of {len(self.tasks)} {what}: {reasons}")
        for reason in (reason for reason in counts if reason != MISSING):
            names = [task.path.name for task in self.to_do if _in_general(task) == reason]
            log.info(f"  {counts[reason]} x {reason}: {some(names)}")


def lay_out(
    requests: Sequence[Request],
    *,
    path_of: Callable[[Item], Path],
    content_of: Callable[[Item], Hashable],
    difference: Callable[[Item], str | None],
) -> Work:
    """Find what is to be done for `requests`.

    `path_of` a sample is its cache file, `content_of` what the file should hold, `difference` why the file that is
    there is not that. Raises `DataError` if two dataset files want different content in one file.
    """
    owners: dict[Path, tuple[Item, list[int]]] = {}
    problems = Problems()
    for number, request in enumerate(requests):
        for item in request.plan.cached_items if request.plan else ():
            first, numbers = owners.setdefault(path_of(item).resolve(), (item, []))
            if content_of(first) != content_of(item):
                problems.add(
                    f"{requests[numbers[0]].path} and {request.path} want different content in {path_of(item)}; "
                    "give each its own cache_directory"
                )
            if number not in numbers:
                numbers.append(number)
    problems.raise_all(DataError)
    tasks = tuple(
        Task(path=path_of(item), item=item, requests=tuple(numbers), reason=difference(item))
        for item, numbers in owners.values()
    )
    return Work(tasks=tasks, summary=_summary(requests, tasks))


def _summary(requests: Sequence[Request], tasks: Sequence[Task]) -> Summary:
    summary = Summary.of(requests)
    for task in tasks:
        for number in task.requests:
            summary.tallies[number].asked += 1
            summary.tallies[number].fresh += task.reason is None
    return summary


def _in_general(task: Task) -> str:
    """The reason without the names of single files, so that equal ones can be counted."""
    reason = (task.reason or "").replace(task.item.source.path.name, "its source")
    return reason.partition(" (")[0]


def _two(counts: Counter[str]) -> Iterator[tuple[str, int]]:
    """Missing ones, and all the others together."""
    stale = sum(count for reason, count in counts.items() if reason != MISSING)
    yield from ((reason, count) for reason, count in ((MISSING, counts[MISSING]), ("stale", stale)) if count)
