"""Reading many tensors of a file at the speed of the disk.

A mapped file is read a page at a time, when a page is touched: fast on Linux with the file in memory, slow on Windows
and on network drives, and always with one thread. Here several threads read large pieces in the order of the file,
ahead of whoever uses the tensors. Pieces for a card go through page-locked memory and a stream of their own, so that
disk, bus and computation work at the same time; pieces for main memory are read to where they stay.

At most `_AHEAD` bytes are read that nobody has asked for yet, whatever the size of the file.
"""

import os
import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from wanlora.foundation.errors import CheckpointError

_PIECE = 32 << 20
_AHEAD = 1 << 30
_MOST_THREADS = 8


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


class _Arriving:
    """A tensor that is being read."""

    def __init__(self, wanted: Wanted) -> None:
        self.wanted = wanted
        self.flat = torch.empty(wanted.num_bytes, dtype=torch.uint8, device=wanted.device)
        # The memory may have belonged to another tensor that the card still reads.
        self.writable = _mark(wanted.device)
        self.copied: list[torch.cuda.Event] = []
        self.missing = -(-wanted.num_bytes // _PIECE)

    def tensor(self) -> Tensor:
        """The tensor, for the stream that asks."""
        for event in self.copied:
            event.wait(torch.cuda.current_stream(self.wanted.device))
        return self.flat.view(self.wanted.dtype).view(self.wanted.shape)


@dataclass(slots=True)
class _Shared:
    """What the reading threads and their user tell each other."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    pieces: deque[tuple[_Arriving, int]] = field(default_factory=deque)
    """Tensor and first byte of each piece that nobody has taken, in the order of the file."""
    error: BaseException | None = None
    over: bool = False


def read_ahead(tensors: Sequence[Wanted], threads: int | None = None) -> Generator[tuple[str, Tensor], None, None]:
    """Each of `tensors` with its name, in the given order, which should be that of the file.

    A tensor belongs to whoever gets it. Raises `CheckpointError` if a file ends early or cannot be read.
    """
    shared = _Shared()
    count = threads or min(_MOST_THREADS, os.cpu_count() or 1)
    workers = [threading.Thread(target=_work, args=(shared,), daemon=True) for _ in range(count)]
    for worker in workers:
        worker.start()
    try:
        yield from _in_order(tensors, shared)
    finally:
        with shared.changed:
            shared.over = True
            shared.changed.notify_all()
        for worker in workers:
            worker.join()


def _in_order(tensors: Sequence[Wanted], shared: _Shared) -> Iterator[tuple[str, Tensor]]:
    waiting = deque(tensors)
    arriving: deque[_Arriving] = deque()
    ahead = 0
    while waiting or arriving:
        while waiting and (not arriving or ahead + waiting[0].num_bytes <= _AHEAD):
            arriving.append(_Arriving(waiting.popleft()))
            ahead += arriving[-1].wanted.num_bytes
            with shared.changed:
                shared.pieces.extend((arriving[-1], start) for start in range(0, len(arriving[-1].flat), _PIECE))
                shared.changed.notify_all()
        first = arriving.popleft()
        ahead -= first.wanted.num_bytes
        with shared.changed:
            while first.missing and shared.error is None:
                shared.changed.wait(0.1)  # a wait without end would not hear Ctrl-C on Windows
            if shared.error is not None:
                raise shared.error
        yield first.wanted.name, first.tensor()


def _work(shared: _Shared) -> None:
    staging: dict[torch.device, _Staging] = {}
    files: dict[Path, IO[bytes]] = {}
    try:
        while True:
            with shared.changed:
                while not shared.pieces and not shared.over:
                    shared.changed.wait()
                if shared.over:
                    return
                tensor, start = shared.pieces.popleft()
            _read(tensor, start, files, staging)
            with shared.changed:
                tensor.missing -= 1
                shared.changed.notify_all()
    except BaseException as error:
        with shared.changed:
            shared.error = error
            shared.changed.notify_all()
    finally:
        for stage in staging.values():
            stage.settle()
        for file in files.values():
            file.close()


def _read(tensor: _Arriving, start: int, files: dict[Path, IO[bytes]], staging: "dict[torch.device, _Staging]") -> None:
    wanted = tensor.wanted
    target = tensor.flat[start : start + _PIECE]
    if wanted.path not in files:
        files[wanted.path] = wanted.path.open("rb", buffering=0)
    files[wanted.path].seek(wanted.start + start)
    if wanted.device.type != "cuda":
        _fill(target, files[wanted.path], wanted)
        return
    if wanted.device not in staging:
        staging[wanted.device] = _Staging(wanted.device)
    stage = staging[wanted.device]
    stage.settle()
    _fill(stage.buffer[: len(target)], files[wanted.path], wanted)
    event = stage.send(target, tensor.writable)
    tensor.copied.append(event)


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


def _fill(target: Tensor, file: IO[bytes], wanted: Wanted) -> None:
    """Read exactly what `target`, on the host, holds."""
    view = target.numpy().data
    try:
        while view:
            count = file.readinto(view)  # type: ignore[attr-defined]
            if not count:
                raise CheckpointError(f"{wanted.path} has become shorter while it was read; fetch or make it again")
            view = view[count:]
    except OSError as error:
        raise CheckpointError(f"{wanted.path} cannot be read ({error.strerror or error}); check the drive") from error
