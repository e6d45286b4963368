"""Reading ahead: bounded, in any number of threads, and honest about faults."""

import threading
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from wanlora.caching.ahead import Failed, read_ahead
from wanlora.foundation.errors import DataError


def _windows(job: int) -> Iterator[tuple[int, int]]:
    for window in range(3):
        yield job, window


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_every_result_of_every_job_comes_once(workers: int) -> None:
    found = list(read_ahead(range(5), _windows, workers=workers))
    assert len(found) == 15
    assert set(found) == {(job, window) for job in range(5) for window in range(3)}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_fault_of_the_data_ends_its_job_and_no_other(workers: int) -> None:
    def read(job: int) -> Iterator[tuple[int, int]]:
        yield job, 0
        if job == 1:
            raise DataError("clip 1 is damaged")
        yield job, 1

    found = list(read_ahead(range(3), read, workers=workers))
    failed = [result for result in found if isinstance(result, Failed)]
    assert [(entry.job, str(entry.error)) for entry in failed] == [(1, "clip 1 is damaged")]
    assert sorted(result for result in found if not isinstance(result, Failed)) == [
        (0, 0),
        (0, 1),
        (1, 0),
        (2, 0),
        (2, 1),
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_fault_of_the_program_is_raised(workers: int) -> None:
    def read(job: int) -> Iterator[int]:
        yield job // 0

    with pytest.raises(ZeroDivisionError):
        list(read_ahead(range(3), read, workers=workers))


def test_what_waits_is_bounded() -> None:
    made = threading.Semaphore(0)
    count = 0

    def read(job: int) -> Iterator[int]:
        nonlocal count
        for window in range(100):
            count += 1
            made.release()
            yield window

    with closing(read_ahead([0], read, workers=1, waiting=2)) as results:
        next(results)
        for _ in range(4):  # one taken, two in the queue, one in the thread's hand
            assert made.acquire(timeout=10)
        time.sleep(0.3)
        assert count == 4


def test_threads_end_when_nobody_listens_any_more() -> None:
    before = threading.active_count()
    results = read_ahead(range(100), _windows, workers=3)
    next(results)
    assert threading.active_count() == before + 3
    results.close()
    assert threading.active_count() == before
