"""Scales that come with a checkpoint, in the shapes that occur in the wild.

ComfyUI writes one number per tensor; others write one per row, or one per tile of the matrix. All of them become the
one shape that `dequantize` takes, or are refused: a scale that is spread wrongly would give a model that runs and is
wrong. Real weight = fp8 * scale in every one of these files.
"""

import torch
from einops import rearrange
from torch import Tensor

from wanlora.foundation.errors import CheckpointError


def as_block_scale(scale: Tensor, shape: tuple[int, int], name: str) -> Tensor:
    """Bring a scale of a weight of `shape` [out, in] to [out or 1, blocks, 1], float32, a copy.

    Accepts a scalar, [out], [out, 1], [out, blocks], [out, blocks, 1] and tiles [rows, blocks] where rows divides out
    and blocks divides in. Raises `CheckpointError` for anything else.
    """
    num_out, num_in = shape
    if scale.numel() == 1:
        return scale.float().reshape(1, 1, 1).clone()
    grid = scale.float()
    if grid.ndim == 3 and grid.shape[2] == 1:
        grid = rearrange(grid, "o b 1 -> o b")
    elif grid.ndim == 1:
        grid = rearrange(grid, "o -> o 1")
    if grid.ndim != 2 or num_out % grid.shape[0] or num_in % grid.shape[1]:
        raise CheckpointError(
            f"the scale of {name} has shape {tuple(scale.shape)}, which does not fit its weight {shape}; "
            "use the bf16 file of this model with --fp8_scaled"
        )
    repeats = 1 if grid.shape[0] == 1 else num_out // grid.shape[0]
    return rearrange(torch.repeat_interleave(grid, repeats, dim=0), "o b -> o b 1")
