"""Names of number formats, as users and files write them."""

import torch

from wanlora.foundation.errors import ConfigError, did_you_mean

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "fp8": torch.float8_e4m3fn,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
}

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
    try:
        return DTYPES[name.lower()]
    except KeyError:
        known = ", ".join(DTYPES)
        raise ConfigError(f"unknown number format {name!r}{did_you_mean(name, DTYPES)}; known: {known}") from None


def dtype_name(dtype: torch.dtype) -> str:
    """The full name, as cache files carry it: `bfloat16`."""
    return str(dtype).removeprefix("torch.")
