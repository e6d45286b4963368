"""What follows each update: limiting the updates' norms."""

from wanlora.lora.network import LoRANetwork


class AfterStep:
    """Called once after each optimizer step; returns numbers to log."""

    def __init__(self, network: LoRANetwork, max_norm: float | None) -> None:
        self.network = network
        self.max_norm = max_norm

    def __call__(self) -> dict[str, float]:
        """Limit the norms if asked; how many were, and what they were."""
        if self.max_norm is None:
            return {}
        stats = self.network.scale_weight_norms(self.max_norm)
        return {
            "max_norm/keys_scaled": stats.num_scaled,
            "max_norm/average_key_norm": stats.mean,
            "max_norm/max_key_norm": stats.max,
        }
