"""Garbage of Python, and the card's memory that hangs on it.

A library for tensors and its compiler make a million objects that stay until the end. Every few dozen training steps
Python's collector looked through all of them, which took 0.3 s on the machine of an H100, as long as a step. So what is
alive at quiet moments is set aside: only what comes later is looked through again and again.
"""

import gc

import torch


def set_aside() -> None:
    """Delete the garbage since the last call, and look no more through what is alive."""
    gc.collect()
    gc.freeze()


def return_memory(device: torch.device) -> None:
    """Delete all garbage, also what was alive when it was set aside, and give memory of the card that is in no tensor
    any more back to the driver."""
    gc.unfreeze()
    set_aside()
    if device.type == "cuda":
        torch.cuda.empty_cache()
