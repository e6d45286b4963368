"""The device that a user names, if it is there."""

import torch

from wanlora.foundation.errors import ConfigError


def find_device(name: str | None) -> torch.device:
    """The device called `name` (cuda, cuda:1, cpu), or a GPU where there is one. Raises `ConfigError`."""
    chosen = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(chosen)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cuda", "cpu"):
        raise ConfigError(f"--device {name} is no device that is used here; type cuda, cuda:1 or cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"--device {name}: PyTorch {torch.__version__} finds {torch.cuda.device_count()} CUDA devices here; "
            "install the CUDA build of PyTorch and the driver, or type --device cpu"
        )
    return device


def place(device: torch.device) -> str:
    """The device in words: `cuda:0 (NVIDIA GeForce RTX 3090)`."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device}" if torch.cuda.is_available() else f"{device} (no CUDA device is found)"
