"""Ctrl-C acts at once, except where the weights would not agree with the position."""

import signal
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.unit.training.parts import CPU
from wanlora.foundation.ranks import Rank
from wanlora.training.interrupts import Interrupts


def interrupts(processes: int = 1, votes: float = 0.0) -> Interrupts:
    """Of a process among several, the others of which cast `votes`."""
    engine: Any = SimpleNamespace(rank=Rank(0, processes), device=CPU, sum=lambda own: own + votes)
    return Interrupts(engine)


def ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


def test_ctrl_c_acts_at_once_between_updates() -> None:
    with interrupts(), pytest.raises(KeyboardInterrupt):
        ctrl_c()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_that_python_drops_acts_at_the_end_of_the_next_update() -> None:
    class Interrupted:
        def __del__(self) -> None:
            ctrl_c()

    done = []
    with interrupts() as made:
        Interrupted()
        done.append("dropped")
        with pytest.raises(KeyboardInterrupt), made.held():
            done.append("whole")
    assert done == ["dropped", "whole"]


def test_ctrl_c_waits_for_the_end_of_an_update() -> None:
    done = []
    with interrupts() as made, pytest.raises(KeyboardInterrupt), made.held():
        ctrl_c()
        ctrl_c()
        done.append("whole")
    assert done == ["whole"]


def test_an_error_inside_an_update_is_not_hidden_by_ctrl_c() -> None:
    with interrupts() as made, pytest.raises(ValueError, match="broken"), made.held():
        ctrl_c()
        raise ValueError("broken")


def test_ctrl_c_while_a_stopped_run_is_saved_changes_nothing() -> None:
    with interrupts() as made:
        with made.ignored():
            ctrl_c()
        with pytest.raises(KeyboardInterrupt):
            ctrl_c()


def test_a_request_to_end_is_the_same_as_ctrl_c() -> None:
    former = signal.getsignal(signal.SIGTERM)
    with interrupts(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is former


def test_several_processes_stop_after_the_same_step() -> None:
    with interrupts(2) as first, first.held():
        ctrl_c()
    with pytest.raises(KeyboardInterrupt):
        first.agree()
    with pytest.raises(KeyboardInterrupt):
        interrupts(2, votes=1.0).agree()
    interrupts(2).agree()


def test_the_former_handler_comes_back() -> None:
    former = signal.getsignal(signal.SIGINT)
    with interrupts():
        assert signal.getsignal(signal.SIGINT) is not former
    assert signal.getsignal(signal.SIGINT) is former


def test_the_vote_is_cast_on_the_engines_device() -> None:
    seen: list[torch.device] = []
    made = interrupts(2)
    made.engine.sum = lambda own: seen.append(own.device) or own  # type: ignore[method-assign, func-returns-value, assignment]
    made.agree()
    assert seen == [CPU]
