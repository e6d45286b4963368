"""Ready-made fp8 weights: reading them back as plain numbers.

ComfyUI's `fp8_scaled` files keep `X.weight` in an 8-bit float and the number it is to be multiplied with beside it, as
`X.scale_weight` or, in newer files, `X.weight_scale`. Scales for whole tensors, for rows and for blocks of a row occur.
Plain fp8 files have no scales. Other 8-bit and 4-bit formats use the same names and are refused.
"""

from collections.abc import Sequence
from math import prod

import torch
from einops import rearrange
from torch import Tensor

from wanlora.foundation.errors import CheckpointError
from wanlora.foundation.tensor_files import TensorSource

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
_SCALES = ("scale_weight", "weight_scale")


def read_weight(source: TensorSource, name: str, device: torch.device) -> Tensor:
    """The tensor `name` on `device`, multiplied with its scale (then in float32) if it has one."""
    dtype = source.dtype(name)
    stem = name.removesuffix("weight")
    scale_name = next((stem + scale for scale in _SCALES if stem + scale in source.names), None)
    if not dtype.is_floating_point or (scale_name is not None and dtype not in FP8_DTYPES):
        raise CheckpointError(
            f"{source.path}: {name} is quantised to {str(dtype).removeprefix('torch.')}, which cannot be read here; "
            "use the bf16, fp16 or fp8_scaled version of the file"
        )
    weight = source.read(name).to(device)
    if scale_name is None:
        return weight
    scale = source.read(scale_name).to(device, torch.float32)
    try:
        return dequantise(weight, scale)
    except ValueError as error:
        raise CheckpointError(f"{source.path}: {scale_name}: {error}; use another version of the file") from error


def dequantise(weight_OI: Tensor, scale: Tensor) -> Tensor:
    """weight * scale in float32, for a scale of shape [], [1], [O], [O, 1], [O, blocks] or [O, blocks, 1].

    Raises `ValueError` for any other shape.
    """
    require_scale(weight_OI.shape, scale.shape)
    rows = len(weight_OI)
    if scale.numel() == 1:
        return weight_OI.float() * scale.reshape(())
    blocks = rearrange(weight_OI.float(), "o (blocks i) -> o blocks i", blocks=scale.numel() // rows)
    return rearrange(blocks * scale.reshape(rows, -1, 1), "o blocks i -> o (blocks i)")


def require_scale(weight: Sequence[int], scale: Sequence[int]) -> None:
    """Raise `ValueError` unless a scale of one shape fits a weight of the other (see `dequantise`)."""
    rows, columns = weight
    count = prod(scale)
    if count != 1 and (scale[0] != rows or count % rows or columns % (count // rows)):
        raise ValueError(f"a scale of shape {tuple(scale)} does not fit a weight of shape {(rows, columns)}")
