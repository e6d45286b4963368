"""Names of number formats, as users and files write them. Without torch, for those who only compare names."""

from wanlora.foundation.errors import ConfigError, did_you_mean

FULL_NAMES = {
    "float32": "float32",
    "fp32": "float32",
    "float": "float32",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
    "fp8": "float8_e4m3fn",
    "float8_e4m3fn": "float8_e4m3fn",
    "float8_e5m2": "float8_e5m2",
}


def full_dtype_name(name: str) -> str:
    """The name that cache files carry, `bfloat16` for `bf16`. Raises `ConfigError` for an unknown one."""
    try:
        return FULL_NAMES[name.lower()]
    except KeyError:
        known = ", ".join(FULL_NAMES)
        raise ConfigError(f"unknown number format {name!r}{did_you_mean(name, FULL_NAMES)}; known: {known}") from None
