"""wan_train_network.py with a probe: `memory/peak_gib` of each step is the peak of that step alone.

The trainer logs the peak since its start, which hides every bucket behind the largest one before it. Nothing else of
the program is changed. `--deterministic` as the first argument makes PyTorch choose deterministic kernels, so that two
runs can be compared bit for bit: the fast attention kernels add up gradients in an order that changes from run to run.
"""

import sys
from collections.abc import Sequence

import torch

from benchmarks.runs import DETERMINISTIC
from wanlora.cli import train_network
from wanlora.memory.measure import peak_memory, reset_peak
from wanlora.training import after_step


def peak_since_last_call(device: torch.device) -> float:
    """The peak of the step that has just ended; the next one begins at what is allocated now."""
    peak = peak_memory(device)
    reset_peak(device)
    return peak


def main(argv: Sequence[str]) -> int:
    """Run the trainer on `argv`."""
    arguments = list(argv)
    if arguments[:1] == [DETERMINISTIC]:
        torch.use_deterministic_algorithms(True)
        del arguments[0]
    assert hasattr(after_step, "peak_memory"), "training/after_step.py no longer asks peak_memory: move the probe"
    after_step.peak_memory = peak_since_last_call
    return train_network.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
