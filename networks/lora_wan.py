"""`--network_module networks.lora_wan`: LoRA for Wan. The adapter itself lives in `wanlora.lora`."""

from wanlora.config.values import NetworkArgs
from wanlora.lora.files import read_lora, save_lora, shapes_from_weights
from wanlora.lora.layers import LoRALinear
from wanlora.lora.merge import MergedLoRAs
from wanlora.lora.metadata import lora_metadata
from wanlora.lora.network import LoRANetwork, eject, inject
from wanlora.lora.targets import candidates, is_partial, select_targets
from wanlora.lora.weights import LoRAWeights

NETWORK_ARGS: tuple[str, ...] = (*NetworkArgs.__dataclass_fields__, "conv_dim", "conv_alpha")
"""The keys that `--network_args` accepts."""

__all__ = [
    "NETWORK_ARGS",
    "LoRALinear",
    "LoRANetwork",
    "LoRAWeights",
    "MergedLoRAs",
    "candidates",
    "eject",
    "inject",
    "is_partial",
    "lora_metadata",
    "read_lora",
    "save_lora",
    "select_targets",
    "shapes_from_weights",
]
