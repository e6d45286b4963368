"""What figures have to be read with: the machine, the versions, the revision that was measured."""

import json
import platform
import subprocess
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from wanlora.foundation.files import write_text

_ROOT = Path(__file__).resolve().parents[1]
_PACKAGES = ("torch", "triton", "bitsandbytes", "accelerate", "safetensors", "diffusers", "peft")


def conditions() -> dict[str, Any]:
    """The head of every report."""
    cuda = torch.cuda.is_available()
    return {
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": _commit(),
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in _PACKAGES},
    }


def machine() -> str:
    """The machine in a line."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    return f"torch {torch.__version__}, {device}"


def report_path(folder: Path, name: str) -> Path:
    """A new file for a report, named after the hour."""
    return folder / f"{name}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}.json"


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Write a report and say where."""
    write_text(path, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    print(f"written: {path}", flush=True)


def package_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The revision that was measured, where git knows it."""
    try:
        answer = subprocess.run(["git", "rev-parse", "HEAD"], cwd=_ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()
