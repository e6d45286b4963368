"""Whether Python keeps what it compiles of the libraries that take longest to import.

Python compiles a module from its text and keeps the result beside it, once. Where it may not, as in many containers, it
compiles PyTorch's thousand modules anew at every start, which takes three times as long as importing them.
"""

import sys
from pathlib import Path
from types import ModuleType


def missing_bytecode(module: ModuleType) -> str | None:
    """Why `module` is compiled from its text at every start, and how to mend it; None if it is not."""
    cached = getattr(module.__spec__, "cached", None)
    if cached is None or Path(cached).exists():
        return None
    if sys.dont_write_bytecode:
        cause = "is told not to keep it (PYTHONDONTWRITEBYTECODE or -B; leave it out)"
    else:
        cause = f"could not write to {Path(cached).parent} (set PYTHONPYCACHEPREFIX to a folder of yours)"
    name = module.__name__
    return f"{name} was compiled from its text, which takes seconds of every start; Python {cause}"
