"""Reading ahead: the next sources are decoded by threads while the model encodes the last ones.

What waits is bounded: each thread holds one result, and the queue a few more, however many windows a clip yields and
however slow the model is.
"""

import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, Full, Queue
from typing import Generic, TypeVar

from wanlora.foundation.errors import DataError

Job = TypeVar("Job")
Result = TypeVar("Result")
_PATIENCE = 0.1
"""Seconds after which a thread that waits looks whether it is still wanted."""


@dataclass(frozen=True, slots=True)
class Failed(Generic[Job]):
    """A job that met a fault of the data; what it yielded before stays valid."""

    job: Job
    error: DataError


@dataclass(frozen=True, slots=True)
class _Done:
    """A thread has no more jobs; `error` is a fault of the program that ended it."""

    error: BaseException | None = None


def read_ahead(
    jobs: Sequence[Job], read: Callable[[Job], Iterable[Result]], *, workers: int, waiting: int = 2
) -> Generator[Result | Failed[Job], None, None]:
    """The results of `read` for every job, as they come; with no workers, one after the other in this thread.

    A `DataError` of one job is given as `Failed` and the others go on; other errors are raised here.
    """
    if workers < 1:
        for job in jobs:
            yield from _results(job, read)
        return
    queue: Queue[Result | Failed[Job] | _Done] = Queue(maxsize=waiting)
    stop = threading.Event()
    remaining = iter(jobs)
    lock = threading.Lock()
    threads = [
        threading.Thread(target=_work, args=(remaining, lock, read, queue, stop), daemon=True)
        for _ in range(min(workers, len(jobs)))
    ]
    for thread in threads:
        thread.start()
    try:
        yield from _received(queue, len(threads))
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def _received(queue: "Queue[Result | Failed[Job] | _Done]", num_threads: int) -> Iterator[Result | Failed[Job]]:
    while num_threads:
        try:
            result = queue.get(timeout=_PATIENCE)  # a wait without end would not hear Ctrl-C on Windows
        except Empty:
            continue
        if not isinstance(result, _Done):
            yield result
        elif result.error is not None:
            raise result.error
        else:
            num_threads -= 1


def _work(
    remaining: Iterator[Job],
    lock: threading.Lock,
    read: Callable[[Job], Iterable[Result]],
    queue: "Queue[Result | Failed[Job] | _Done]",
    stop: threading.Event,
) -> None:
    end = _Done()
    try:
        while not stop.is_set():
            with lock:
                job = next(remaining)
            for result in _results(job, read):
                if not _put(queue, result, stop):
                    return
    except StopIteration:
        pass
    except BaseException as error:
        end = _Done(error)
    _put(queue, end, stop)


def _results(job: Job, read: Callable[[Job], Iterable[Result]]) -> Iterator[Result | Failed[Job]]:
    try:
        yield from read(job)
    except DataError as error:
        yield Failed(job, error)


def _put(queue: "Queue[Result]", result: Result, stop: threading.Event) -> bool:
    """Hand over a result; False if nobody wants it any more."""
    while not stop.is_set():
        with suppress(Full):
            queue.put(result, timeout=_PATIENCE)
            return True
    return False
