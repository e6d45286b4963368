"""Quantising a transformer while it is read.

`load_transformer` hands over one tensor at a time, so the full-width weight of a layer exists only while it is being
quantised and the device never holds the bf16 model. Matrices of the blocks' linears become `Fp8Linear`; norms, biases,
modulation, embeddings and the head, which are small and on which much depends, stay as they are. Weights that a file
has in eight bits already are kept to the bit, whatever scales it gives them.

Maths in eight bits want one scale for each output (mode "rows"). Weights that a file has with other scales are then
widened and rounded anew, which adds an error of its own.
"""

import re
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from wanlora.foundation.errors import CheckpointError
from wanlora.models.wan.checkpoint import install_parameter
from wanlora.models.wan.transformer import WanTransformer
from wanlora.quantization.blockwise import (
    BLOCK,
    dequantize,
    has_blocks,
    quantize_blockwise,
    relative_error,
    to_fp8,
)
from wanlora.quantization.fast_linear import FastFp8Linear
from wanlora.quantization.linear import Fp8Linear
from wanlora.quantization.ready_made import as_block_scale
from wanlora.quantization.scaled_matmul import MULTIPLE, choose_kernel, fits

Mode = Literal["scaled", "plain", "rows"]
_BLOCK_WEIGHT = re.compile(r"^(?:vace_)?blocks\.\d+\..+\.weight$")
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(kw_only=True, slots=True)
class Fp8Report:
    """What became of the weights."""

    quantized: list[str] = field(default_factory=list)
    """Weights made fp8 here."""
    per_row: list[str] = field(default_factory=list)
    """Those of them with one scale per row, because 64 does not divide their inputs."""
    ready_made: list[str] = field(default_factory=list)
    """Weights that the file has in fp8, kept to the bit."""
    rounded_anew: list[str] = field(default_factory=list)
    """Weights that the file has in fp8 with scales that fp8 maths cannot use."""
    wide_maths: list[str] = field(default_factory=list)
    """Weights of a shape that fp8 maths cannot take."""
    excluded: list[str] = field(default_factory=list)
    """Matrices that stay in full width."""
    measured: str = ""
    """The layer that errors were measured on."""
    scaled_error: float = 0.0
    """Relative error of that layer with scales for blocks."""
    rows_error: float = 0.0
    """With one scale for each output."""
    plain_error: float = 0.0
    """And without."""


class Fp8Installer:
    """The `install` hook of `load_transformer` for fp8 weights.

    Weights are quantised on `device`, where the loader puts them, and stay there. `dtype` is the compute dtype. Mode
    "plain" casts without scales; "rows" makes layers that also multiply in fp8 (`FastFp8Linear`), emulated where
    `device` is no card. After loading, `report` has the counts and `summary()` the lines for the log. Raises
    `CheckpointError` for scales that do not fit and for values that are not finite.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, mode: Mode = "scaled") -> None:
        self.device = device
        self.dtype = dtype
        self.mode = mode
        self.report = Fp8Report()

    def __call__(self, model: WanTransformer, name: str, tensor: Tensor, scale: Tensor | None) -> None:
        """Put one tensor, under its official name, into the model."""
        owner_name = name.rpartition(".")[0]
        owner = model.get_submodule(owner_name)
        if not (_BLOCK_WEIGHT.match(name) and isinstance(owner, nn.Linear)):
            if isinstance(owner, nn.Linear) and name.endswith(".weight"):
                self.report.excluded.append(name)
            install_parameter(model, name, tensor.to(self.device), scale)
            return
        weight, scale = self._convert(name, tensor.to(self.device), scale)
        linear = self._linear(name, weight, scale)
        linear.bias = owner.bias  # loaded already, or still without memory and loaded later
        model.set_submodule(owner_name, linear)

    def _linear(self, name: str, weight: Tensor, scale: Tensor) -> Fp8Linear:
        if self.mode == "rows" and fits(*weight.shape):
            return FastFp8Linear(weight, scale, compute_dtype=self.dtype, kernel=choose_kernel(self.device))
        if self.mode == "rows":
            self.report.wide_maths.append(name)
        return Fp8Linear(weight, scale, compute_dtype=self.dtype)

    def _convert(self, name: str, tensor: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
        """The weight in fp8 and its scale [out or 1, blocks, 1]."""
        if tensor.dtype in _FP8:
            given = self._one() if scale is None else scale.to(tensor.device)
            return self._ready_made(name, tensor, as_block_scale(given, (tensor.shape[0], tensor.shape[1]), name))
        if not torch.stack(torch.aminmax(tensor)).isfinite().all():
            raise CheckpointError(f"{name} holds values that are not finite numbers; fetch the file again")
        self.report.quantized.append(name)
        if not self.report.measured:
            self._measure(name, tensor)
        if self.mode == "plain":
            return to_fp8(tensor), self._one()
        if self.mode == "rows":
            return quantize_blockwise(tensor, tensor.shape[1])
        if not has_blocks(tensor.shape[1]):
            self.report.per_row.append(name)
        return quantize_blockwise(tensor)

    def _ready_made(self, name: str, tensor: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """A weight that is fp8 in the file, with scales [out or 1, blocks, 1]: as it is wherever that will do."""
        if self.mode == "rows" and (scale.shape[1] > 1 or tensor.dtype is not torch.float8_e4m3fn):
            self.report.rounded_anew.append(name)
            wide = dequantize(tensor.to(self.device), scale.to(self.device), torch.float32)
            return quantize_blockwise(wide, tensor.shape[1])
        self.report.ready_made.append(name)
        if self.mode == "rows":
            scale = scale.expand(tensor.shape[0], 1, 1).contiguous()
        return tensor.clone(), scale

    def _one(self) -> Tensor:
        return torch.ones((1, 1, 1), device=self.device)

    def _measure(self, name: str, tensor: Tensor) -> None:
        """What each mode would make of this weight."""
        self.report.measured = name
        self.report.scaled_error = relative_error(tensor, *quantize_blockwise(tensor))
        self.report.rows_error = relative_error(tensor, *quantize_blockwise(tensor, tensor.shape[1]))
        self.report.plain_error = relative_error(tensor, to_fp8(tensor), self._one())

    def summary(self) -> list[str]:
        """Lines for the log: what was quantised, how well, and what was not."""
        report = self.report
        lines = []
        if report.quantized:
            error, how = {
                "scaled": (report.scaled_error, f"a scale per {BLOCK} inputs"),
                "plain": (report.plain_error, "no scales"),
                "rows": (report.rows_error, "a scale per output"),
            }[self.mode]
            lines.append(
                f"fp8: {len(report.quantized)} block weights with {how}, relative error {error:.1%} on "
                f"{report.measured}; {len(report.excluded)} matrices outside the blocks are kept in full"
            )
        if self.mode == "plain" and report.quantized:
            lines.append(
                f"fp8 with scales is better: --fp8_scaled has a relative error of {report.scaled_error:.1%} "
                "there and takes 6 % more memory"
            )
        if report.per_row:
            lines.append(
                f"fp8: {len(report.per_row)} weights have inputs that {BLOCK} does not divide and one scale per row"
            )
        if report.ready_made:
            lines.append(f"fp8: {len(report.ready_made)} weights are in fp8 in the file and kept as they are")
        if report.rounded_anew:
            lines.append(
                f"fp8: {len(report.rounded_anew)} weights are in fp8 in the file, with scales that fp8 maths cannot "
                "use, and were rounded anew to a scale per output; the bf16 file of the model would be more exact"
            )
        if report.wide_maths:
            lines.append(
                f"fp8: {len(report.wide_maths)} weights have a side that {MULTIPLE} does not divide; their maths are "
                "not in fp8"
            )
        return lines
