"""How much of the system's memory is free."""

import ctypes
import sys
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")


def available_host_memory() -> int | None:
    """Bytes that can be had without pushing others out; None where the system does not say."""
    if sys.platform == "win32":
        return _available_on_windows()
    if not _MEMINFO.is_file():
        return None
    rows = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines() if ":" in line)
    text = rows.get("MemAvailable", "").split()
    return int(text[0]) * 1024 if text else None


class _MemoryStatus(ctypes.Structure):
    """MEMORYSTATUSEX of the Windows API."""

    _fields_ = (
        ("length", ctypes.c_uint32),
        ("load", ctypes.c_uint32),
        *((name, ctypes.c_uint64) for name in ("total", "available", "total_page", "available_page")),
        *((name, ctypes.c_uint64) for name in ("total_virtual", "available_virtual", "available_extended")),
    )


def _available_on_windows() -> int | None:
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    kernel = ctypes.WinDLL("kernel32")  # type: ignore[attr-defined,unused-ignore]
    return int(status.available) if kernel.GlobalMemoryStatusEx(ctypes.byref(status)) else None
