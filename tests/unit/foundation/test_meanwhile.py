"""Work beside something else is done afterwards, and nobody waits for it in vain."""

import sys
import threading

import pytest

from wanlora.foundation.meanwhile import importing, meanwhile


def test_the_work_is_done_by_another_thread_and_has_been_afterwards() -> None:
    go_on, done = threading.Event(), []

    def work() -> None:
        assert go_on.wait(10)
        done.append(threading.current_thread())

    with meanwhile(work):
        assert not done
        go_on.set()
    assert len(done) == 1 and done[0] is not threading.current_thread()


def test_an_error_of_the_work_is_dropped_and_one_of_the_caller_waits_for_nothing() -> None:
    with meanwhile(lambda: [][0]), importing("no_such_module"):
        pass
    began, go_on, workers = threading.Event(), threading.Event(), []

    def work() -> None:
        workers.append(threading.current_thread())
        began.set()
        go_on.wait(10)

    with pytest.raises(KeyboardInterrupt), meanwhile(work):
        assert began.wait(10)
        raise KeyboardInterrupt
    (worker,) = workers
    assert worker.is_alive() and worker.daemon
    go_on.set()
    worker.join()


def test_a_module_is_there_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "this", raising=False)
    with importing("this"):
        pass
    assert "this" in sys.modules
