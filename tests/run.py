"""Every check of the project, in the order of what it costs: style, types, import contracts, tests.

python tests/run.py             everything that runs on a CPU in minutes
python tests/run.py -m slow     arguments are handed to pytest
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
CHECKS = (
    [sys.executable, "-m", "ruff", "check", "."],
    [sys.executable, "-m", "ruff", "format", "--check", "."],
    [sys.executable, "-m", "mypy"],
    [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"],
    [sys.executable, "-m", "pytest", "-n", "2", "--durations", "10"],
)


def main() -> int:
    """Run every check, also after one has failed; the exit code is 0 only if all passed."""
    failed = []
    for check in CHECKS:
        command = [*check, *sys.argv[1:]] if "pytest" in check else check
        print("$", " ".join(command[1:]), flush=True)
        # Two pytest workers with a thread each finish long before two that fight over the cores with all their threads.
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        if subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode:
            failed.append(" ".join(command[2:3]))
    if failed:
        print("failed:", ", ".join(failed))
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
