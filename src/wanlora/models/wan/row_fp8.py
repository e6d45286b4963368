"""A frozen linear layer in one byte per weight.

Each output row is stored as float8 (e4m3) with one float32 scale, chosen so that the row's largest weight meets the
format's largest number; a plain cast would lose small rows to underflow. For a product the bytes are cast up, which is
exact, and the scale is applied to the result: maths run in the input's number format, nothing else is rounded.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FP8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(FP8).max


def quantise_rows(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """The weight as float8 [O, I] and its float32 scales [O]: weight = float8 * scale, row by row."""
    weight_OI = weight_OI.float()
    scale_O = weight_OI.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / _LARGEST
    # Older versions of torch turn what lies above the largest number into NaN.
    return (weight_OI / scale_O[:, None]).clamp(-_LARGEST, _LARGEST).to(FP8), scale_O


class RowFp8Linear(nn.Module):
    """x W^T without a bias, W in float8 with a scale per row. It has no gradient for W."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out_features, in_features, dtype=FP8), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(out_features), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return (F.linear(x, self.weight.to(x.dtype)) * self.scale).to(x.dtype)
