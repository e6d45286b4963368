"""What follows each update: limiting the updates' norms, and measuring time and memory."""

import time

import torch

from wanlora.lora.network import LoRANetwork
from wanlora.memory.measure import peak_memory, reset_peak


class AfterStep:
    """Called once after each optimizer step; returns numbers to log."""

    def __init__(self, network: LoRANetwork, max_norm: float | None, device: torch.device) -> None:
        self.network = network
        self.max_norm = max_norm
        self.device = device
        self.last = time.perf_counter()

    def __call__(self) -> dict[str, float]:
        """Limit the norms if asked; seconds since the last call, and the card's peak memory since then in GiB."""
        values: dict[str, float] = {}
        if self.max_norm is not None:
            stats = self.network.scale_weight_norms(self.max_norm)
            values = {
                "max_norm/keys_scaled": stats.num_scaled,
                "max_norm/average_key_norm": stats.mean,
                "max_norm/max_key_norm": stats.max,
            }
        now = time.perf_counter()
        values["seconds"], self.last = now - self.last, now
        if self.device.type == "cuda":
            values["memory/peak_gib"] = peak_memory(self.device)
            reset_peak(self.device)
        return values
