"""Reading many tensors of a file at the speed of the disk.

A mapped file is read a page at a time, when a page is touched: fast on Linux with the file in memory, slow on Windows
and on network drives, and always with one thread. Here several threads read large pieces in the order of the file,
ahead of whoever uses the tensors. Pieces for a card go through page-locked memory and a stream of their own, so that
disk, bus and computation work at the same time; pieces for main memory are read to where they stay.

A model has some thousand tensors, most of them small, and all threads share one interpreter: what is done for each of
them soon takes longer than reading. So tensors that follow each other in a file are read together, into one piece of
memory, and each is a window into it; the threads hear of groups and of large pieces, never of tensors.

At most `_AHEAD` bytes are read that nobody has asked for yet, whatever the size of the file.
"""

import os
import sys
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from wanlora.foundation.errors import CheckpointError

_PIECE = 32 << 20
_GROUP = 128 << 20
"""Tensors are read together up to so many bytes; a larger one is read alone."""
_GAP = 64 << 10
"""So many bytes between two tensors that nobody wants are read rather than skipped."""
_AHEAD = 1 << 30
_MOST_THREADS = 8
_TURN = 0.0005
"""Seconds after which a thread that computes in Python lets one that reads have its turn; usually 0.005."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """A tensor, where it lies and where it shall be."""

    name: str
    path: Path
    start: int
    """First byte in the file."""
    num_bytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def end(self) -> int:
        """One past the last byte."""
        return self.start + self.num_bytes


class _Group:
    """Neighbours in a file that are being read."""

    def __init__(self, tensors: Sequence[Wanted]) -> None:
        self.tensors = tensors
        first = tensors[0]
        self.path, self.start = first.path, first.start
        self.num_bytes = _span(tensors)
        self.flat = torch.empty(self.num_bytes, dtype=torch.uint8, device=first.device)
        self.device = self.flat.device  # with its number: which card is the current one differs between threads
        # The memory may have belonged to others that the card still reads.
        self.writable = _mark(self.device)
        self.copied: list[torch.cuda.Event] = []
        self.missing = -(-self.num_bytes // _PIECE)

    def windows(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors, for the stream that asks."""
        for event in self.copied:
            event.wait(torch.cuda.current_stream(self.device))
        for wanted in self.tensors:
            start = wanted.start - self.start
            flat = self.flat[start : start + wanted.num_bytes]
            if start % wanted.dtype.itemsize:
                flat = flat.clone()  # numbers of several bytes begin at a multiple of them
            yield wanted.name, flat.view(wanted.dtype).view(wanted.shape)


class _Shared:
    """What the reading threads and their user tell each other."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.to_do = threading.Condition(self.lock)
        """There are pieces to read, or it is over."""
        self.arrived = threading.Condition(self.lock)
        """A group is complete, or there is an error."""
        self.pieces: deque[tuple[_Group, int]] = deque()
        """Group and first byte of each piece that nobody has taken, in the order of the file."""
        self.error: BaseException | None = None
        self.over = False


def read_ahead(tensors: Sequence[Wanted], threads: int | None = None) -> Generator[tuple[str, Tensor], None, None]:
    """Each of `tensors` with its name, in the given order, which should be that of the file.

    A tensor is a window into memory that it shares with its neighbours: copy what is to stay. Raises `CheckpointError`
    if a file ends early or cannot be read.
    """
    shared = _Shared()
    count = threads or min(_MOST_THREADS, os.cpu_count() or 1)
    workers = [threading.Thread(target=_work, args=(shared,), daemon=True) for _ in range(count)]
    for worker in workers:
        worker.start()
    usual_turn = sys.getswitchinterval()
    sys.setswitchinterval(min(_TURN, usual_turn))
    try:
        yield from _in_order(tensors, shared)
    finally:
        with shared.lock:
            shared.over = True
            shared.to_do.notify_all()
        for worker in workers:
            worker.join()
        sys.setswitchinterval(usual_turn)


def _neighbours(tensors: Iterable[Wanted]) -> Iterator[list[Wanted]]:
    """Cut into what is read together."""
    group: list[Wanted] = []
    for wanted in tensors:
        if group and not _belongs(wanted, group):
            yield group
            group = []
        group.append(wanted)
    if group:
        yield group


def _belongs(wanted: Wanted, group: Sequence[Wanted]) -> bool:
    last = group[-1]
    near = (wanted.path, wanted.device) == (last.path, last.device) and 0 <= wanted.start - last.end <= _GAP
    return near and wanted.end - group[0].start <= _GROUP


def _span(tensors: Sequence[Wanted]) -> int:
    return tensors[-1].end - tensors[0].start


def _in_order(tensors: Sequence[Wanted], shared: _Shared) -> Iterator[tuple[str, Tensor]]:
    waiting = deque(_neighbours(tensors))
    arriving: deque[_Group] = deque()
    ahead = 0
    while waiting or arriving:
        while waiting and (not arriving or ahead + _span(waiting[0]) <= _AHEAD):
            arriving.append(_begun(waiting.popleft(), shared))
            ahead += arriving[-1].num_bytes
        ahead -= arriving[0].num_bytes
        yield from _complete(arriving.popleft(), shared).windows()


def _begun(tensors: Sequence[Wanted], shared: _Shared) -> _Group:
    group = _Group(tensors)
    with shared.lock:
        shared.pieces.extend((group, start) for start in range(0, group.num_bytes, _PIECE))
        shared.to_do.notify(group.missing)
    return group


def _complete(group: _Group, shared: _Shared) -> _Group:
    with shared.lock:
        while group.missing and shared.error is None:
            shared.arrived.wait(0.1)  # a wait without end would not hear Ctrl-C on Windows
        if shared.error is not None:
            raise shared.error
    return group


def _work(shared: _Shared) -> None:
    staging: dict[torch.device, _Staging] = {}
    files: dict[Path, IO[bytes]] = {}
    try:
        while True:
            with shared.lock:
                while not shared.pieces and not shared.over:
                    shared.to_do.wait()
                if shared.over:
                    return
                group, start = shared.pieces.popleft()
            _read(group, start, files, staging)
            with shared.lock:
                group.missing -= 1
                if not group.missing:
                    shared.arrived.notify()
            del group
    except BaseException as error:
        with shared.lock:
            shared.error = error
            shared.arrived.notify()
    finally:
        for stage in staging.values():
            stage.settle()
        for file in files.values():
            file.close()


def _read(group: _Group, start: int, files: dict[Path, IO[bytes]], staging: "dict[torch.device, _Staging]") -> None:
    target = group.flat[start : start + _PIECE]
    if group.path not in files:
        files[group.path] = group.path.open("rb", buffering=0)
    files[group.path].seek(group.start + start)
    if group.device.type != "cuda":
        _fill(target, files[group.path], group.path)
        return
    if group.device not in staging:
        staging[group.device] = _Staging(group.device)
    stage = staging[group.device]
    stage.settle()
    _fill(stage.buffer[: len(target)], files[group.path], group.path)
    group.copied.append(stage.send(target, group.writable))


class _Staging:
    """A thread's page-locked buffer and its own way to the card."""

    def __init__(self, device: torch.device) -> None:
        self.buffer = torch.empty(_PIECE, dtype=torch.uint8, pin_memory=True)
        self._stream = torch.cuda.Stream(device)
        self._sent: torch.cuda.Event | None = None

    def settle(self) -> None:
        """Wait until the buffer may be filled again."""
        if self._sent is not None:
            self._sent.synchronize()

    def send(self, target: Tensor, writable: "torch.cuda.Event | None") -> torch.cuda.Event:
        """Queue the copy of the buffer to `target`, after `writable`."""
        with torch.cuda.stream(self._stream):
            if writable is not None:
                self._stream.wait_event(writable)
            target.copy_(self.buffer[: len(target)], non_blocking=True)
            self._sent = self._stream.record_event()
        return self._sent


def _mark(device: torch.device) -> "torch.cuda.Event | None":
    """Everything that has been queued on the device until now."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


def _fill(target: Tensor, file: IO[bytes], path: Path) -> None:
    """Read exactly what `target`, on the host, holds."""
    view = target.numpy().data
    try:
        while view:
            count = file.readinto(view)  # type: ignore[attr-defined]
            if not count:
                raise CheckpointError(f"{path} has become shorter while it was read; fetch or make it again")
            view = view[count:]
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error}); check the drive") from error
