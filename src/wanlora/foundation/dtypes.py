"""Number formats by name."""

import torch

from wanlora.foundation.dtype_names import full_dtype_name

SAFETENSORS_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Names in a safetensors header."""


def parse_dtype(name: str) -> torch.dtype:
    """The torch dtype that `name` stands for. Raises `ConfigError` for an unknown name."""
    dtype: torch.dtype = getattr(torch, full_dtype_name(name))
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """The full name, as cache files carry it: `bfloat16`."""
    return str(dtype).removeprefix("torch.")
