"""All adapters of a model together: put in, taken out, switched off, grouped for the optimizer, saved, limited.

`inject` replaces each chosen linear layer by a `LoRALinear` around it and `eject` puts the very same layer back. The
frozen weights are never changed, only hidden behind one attribute, so the model can stream and quantise them as before;
what training owns is exactly `LoRANetwork.parameters()`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wanlora.foundation.errors import CheckpointError, few
from wanlora.foundation.log import log
from wanlora.lora.layers import LoRALinear
from wanlora.lora.targets import candidates
from wanlora.lora.weights import LoRAWeights


@dataclass(frozen=True, kw_only=True, slots=True)
class NormStats:
    """What `scale_weight_norms` did."""

    num_scaled: int
    """Modules whose update was above the limit."""
    mean: float
    """Mean norm of the updates afterwards."""
    max: float
    """Largest norm afterwards."""


class LoRANetwork:
    """The adapters that were injected into `model`, by official module path.

    Not a module: the base must stay out of what is trained, saved and reduced over devices.
    """

    def __init__(self, model: nn.Module, adapters: Mapping[str, LoRALinear]) -> None:
        self.model = model
        self.adapters = dict(adapters)

    def __len__(self) -> int:
        return len(self.adapters)

    @property
    def is_partial(self) -> bool:
        """Whether some linear layer of the blocks has no adapter."""
        return set(self.adapters) != set(candidates(self.model))

    def parameters(self) -> list[nn.Parameter]:
        """Everything that is trained: each module's down factor, then its up factor."""
        return [p for adapter in self.adapters.values() for p in (adapter.lora_down.weight, adapter.lora_up.weight)]

    @property
    def num_parameters(self) -> int:
        """Trained numbers."""
        return sum(parameter.numel() for parameter in self.parameters())

    def groups(self, lr: float, loraplus_lr_ratio: float | None = None) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer, with `params`, `lr` and a `name` for the log.

        LoRA+ (arXiv:2402.12354): with a ratio the up factors form a second group that learns at `lr` times the ratio.
        """
        if loraplus_lr_ratio is None:
            return [{"params": self.parameters(), "lr": lr, "name": "unet"}]
        down = [adapter.lora_down.weight for adapter in self.adapters.values()]
        up = [adapter.lora_up.weight for adapter in self.adapters.values()]
        return [
            {"params": down, "lr": lr, "name": "unet"},
            {"params": up, "lr": lr * loraplus_lr_ratio, "name": "unet plus"},
        ]

    def train(self, mode: bool = True) -> "LoRANetwork":
        """Turn the dropouts on or off."""
        for adapter in self.adapters.values():
            adapter.training = mode
        return self

    def set_multiplier(self, multiplier: float) -> None:
        """Strength of all adapters; 0 gives the base model bit for bit."""
        for adapter in self.adapters.values():
            adapter.multiplier = multiplier

    @contextmanager
    def enabled(self, on: bool) -> Iterator[None]:
        """Within the block the adapters act as they do now (`on`) or not at all."""
        before = {name: adapter.multiplier for name, adapter in self.adapters.items()}
        if not on:
            self.set_multiplier(0.0)
        try:
            yield
        finally:
            for name, adapter in self.adapters.items():
                adapter.multiplier = before[name]

    def weights(self) -> dict[str, LoRAWeights]:
        """The live weights, not copied, with alpha = scale times rank."""
        return {
            name: LoRAWeights(a.lora_down.weight.detach(), a.lora_up.weight.detach(), a.scale * a.rank)
            for name, a in self.adapters.items()
        }

    def state_dict(self) -> dict[str, Tensor]:
        """Training state: `blocks.0.self_attn.q.lora_down.weight` and so on, float32, not copied."""
        return {
            f"{name}.{factor}.weight": tensor
            for name, weights in self.weights().items()
            for factor, tensor in (("lora_down", weights.down), ("lora_up", weights.up))
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a training state. Raises `CheckpointError` unless names and shapes are those of this network."""
        self.check_state({name: tuple(tensor.shape) for name, tensor in state.items()})
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])

    def check_state(self, shapes: Mapping[str, tuple[int, ...]], source: str = "the saved state") -> None:
        """Raise `CheckpointError` unless a training state with tensors of these shapes is one of this network.

        `source` names the state in messages.
        """
        own = self.state_dict()
        if set(own) != set(shapes):
            raise CheckpointError(
                f"{source} adapts other modules than this run ({_difference(own, shapes)}); resume with the "
                "network arguments it was made with"
            )
        wrong = [name for name in own if own[name].shape != shapes[name]]
        if wrong:
            name = wrong[0]
            raise CheckpointError(
                f"{source} has {name} as {list(shapes[name])}, this run as {list(own[name].shape)}; resume "
                "with the --network_dim it was made with"
            )

    def load(self, weights: Mapping[str, LoRAWeights], source: str = "the LoRA file") -> None:
        """Go on from the weights of a file (`read_lora`); `source` names it in messages.

        Where the file's alpha / rank differs from this run's, the up factor is rescaled so that the effect is the same.
        Modules that the file lacks keep their untrained adapter, which is said. Raises what `check` raises.
        """
        self.check(weights, source)
        rescaled = [name for name, given in weights.items() if not _close(given.scale, self.adapters[name].scale)]
        for name, given in weights.items():
            adapter = self.adapters[name]
            adapter.lora_down.weight.data.copy_(given.down)
            adapter.lora_up.weight.data.copy_(given.up)
        for name in rescaled:
            adapter = self.adapters[name]
            adapter.lora_up.weight.data.mul_(weights[name].scale / adapter.scale)
        log.info(f"{source}: {len(weights)}/{len(self)} modules go on from it")
        if rescaled:
            given, scale = weights[rescaled[0]], self.adapters[rescaled[0]].scale
            log.info(
                f"{source} was trained with alpha {given.alpha:g} at rank {given.rank}, this run has alpha / rank = "
                f"{scale:g}; its weights were rescaled so that their effect is unchanged"
            )
        if absent := [name for name in self.adapters if name not in weights]:
            log.warning(f"{source} lacks {len(absent)} modules of this run ({few(absent)}); they start untrained")

    def check(self, weights: Mapping[str, LoRAWeights], source: str = "the LoRA file") -> None:
        """Raise `CheckpointError` if a file has a module without an adapter here, another rank or other sizes."""
        if unknown := [name for name in weights if name not in self.adapters]:
            raise CheckpointError(
                f"{source} holds {len(unknown)} modules that this run does not train ({few(unknown)}), and their "
                "training would be lost; change include_patterns and exclude_patterns, or merge the file with "
                "--base_weights"
            )
        for name, given in weights.items():
            adapter = self.adapters[name]
            if given.rank != adapter.rank:
                raise CheckpointError(
                    f"{source} has rank {given.rank} at {name}, this run --network_dim {adapter.rank}; use "
                    f"--network_dim {given.rank} or --dim_from_weights"
                )
            sizes = (given.down.shape[1], given.up.shape[0])
            if sizes != (adapter.in_features, adapter.out_features):
                raise CheckpointError(
                    f"{source} was made for another model: its {name} maps {sizes[0]} to {sizes[1]}, this model's "
                    f"{adapter.in_features} to {adapter.out_features}"
                )

    @torch.no_grad()
    def norms(self) -> dict[str, Tensor]:
        """Frobenius norm of every module's update at multiplier 1: 0-dim tensors, without waiting for the device.

        From the r x r Gram matrices: |BA|² = sum of (BᵀB) times (AAᵀ), so the product of the factors is never formed.
        """
        norms = {}
        for name, adapter in self.adapters.items():
            down, up = adapter.lora_down.weight, adapter.lora_up.weight
            square = ((up.T @ up) * (down @ down.T)).sum().clamp(min=0)
            norms[name] = square.sqrt() * abs(adapter.scale)
        return norms

    @torch.no_grad()
    def scale_weight_norms(self, max_norm: float) -> NormStats:
        """Shrink every update whose norm is above `max_norm` to it; both factors take the square root of the ratio."""
        norms = torch.stack(list(self.norms().values()))
        ratios = (max_norm / norms.clamp(min=max_norm)).sqrt()
        for adapter, ratio in zip(self.adapters.values(), ratios, strict=True):
            adapter.lora_down.weight.mul_(ratio)
            adapter.lora_up.weight.mul_(ratio)
        after = norms.clamp(max=max_norm)
        num_scaled, mean, largest = torch.stack([(norms > max_norm).sum().float(), after.mean(), after.max()]).tolist()
        return NormStats(num_scaled=int(num_scaled), mean=mean, max=largest)


def inject(
    model: nn.Module,
    targets: Sequence[str],
    *,
    rank: int | Mapping[str, int],
    alpha: float | Mapping[str, float] | None = None,
    generator: torch.Generator,
    downs: Mapping[str, Tensor] | None = None,
    dropout: float | None = None,
    rank_dropout: float | None = None,
    module_dropout: float | None = None,
    device: torch.device | None = None,
) -> LoRANetwork:
    """Put an untrained adapter on each of `targets` (`select_targets`) and freeze everything else.

    `rank` and `alpha` may differ by module (`shapes_from_weights`); alpha None or 0 means alpha = rank. `generator`
    draws the first down factors in the order of `targets` unless they are given by name (`drawing_downs`). `device` is
    where the trained weights live, by default where each base weight is. Raises `ValueError` if the model has adapters.
    """
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise ValueError("this model has adapters already; eject them first")
    model.requires_grad_(False)
    adapters = {}
    for name in targets:
        module_rank = rank if isinstance(rank, int) else rank[name]
        module_alpha = alpha[name] if isinstance(alpha, Mapping) else alpha
        adapters[name] = LoRALinear(
            model.get_submodule(name),
            rank=module_rank,
            scale=(module_alpha or module_rank) / module_rank,
            generator=generator,
            down=downs[name] if downs else None,
            dropout=dropout or 0.0,
            rank_dropout=rank_dropout or 0.0,
            module_dropout=module_dropout or 0.0,
            device=device,
        )
    for name, adapter in adapters.items():
        model.set_submodule(name, adapter)
    return LoRANetwork(model, adapters)


def eject(network: LoRANetwork) -> nn.Module:
    """Put the original layers back; the inverse of `inject`. The network keeps its weights but acts on nothing."""
    for name, adapter in network.adapters.items():
        if network.model.get_submodule(name) is not adapter:
            raise ValueError(f"{name} does not hold this network's adapter; was it ejected before?")
    for name, adapter in network.adapters.items():
        network.model.set_submodule(name, adapter.base)
    return network.model


def _close(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-6 * max(abs(a), abs(b))


def _difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    missing = [name for name in ours if name not in theirs]
    extra = [name for name in theirs if name not in ours]
    parts = [f"it lacks {few(missing)}"] if missing else []
    return "; ".join(parts + ([f"only it has {few(extra)}"] if extra else []))
