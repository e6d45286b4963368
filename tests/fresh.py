"""Code in a process of its own, for what is true only before anything has been imported."""

import subprocess
import sys


def run_fresh(code: str, *arguments: str) -> None:
    """Run `code` with another interpreter; what it asserts or raises fails the test."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
