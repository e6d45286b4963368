"""Reading and writing LoRA files.

Reading recognises every spelling by itself and refuses what it does not understand, by name: a key that matches no
module means that part of the file would be ignored and trained from scratch without a word.

Writing proves its result: the file is written under a temporary name and read back, every key must map to a module of
the model, and every module's update, applied to a random vector, must equal the live one up to the rounding of the
number format. Only then does it get its name.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from wanlora.foundation.dtypes import dtype_name
from wanlora.foundation.errors import CheckpointError, did_you_mean, few
from wanlora.foundation.files import atomic_path
from wanlora.foundation.log import log, warn_once
from wanlora.foundation.tensor_files import TensorSource, open_tensors, save_tensors
from wanlora.lora.metadata import model_hashes
from wanlora.lora.network import LoRANetwork
from wanlora.lora.spelling import SPELLINGS, resolve, split_key
from wanlora.lora.targets import candidates
from wanlora.lora.weights import LoRAWeights

_FOREIGN = {
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lora_mid": "LoCon with a Tucker core",
    "boft_": "BOFT",
    "oft_": "OFT",
}


@dataclass(frozen=True, slots=True)
class LoRAFile:
    """A file's content under the names that the file uses."""

    path: Path
    loras: dict[str, LoRAWeights]
    """By module."""
    differences: dict[str, Tensor]
    """Whole differences of weights (`module.diff`) and biases (`module.diff_b`), as distilled models come with."""


def read_file(path: Path) -> LoRAFile:
    """Read a LoRA file of any spelling. Raises `CheckpointError` for another kind of file."""
    with open_tensors(path) as source:
        parts, differences = _sort_keys(source)
        declared = _declared_alphas(source.metadata)
        loras = {module: _weights(path, module, found, source, declared) for module, found in parts.items()}
        return LoRAFile(path, loras, {key: source.read(key).clone() for key in differences})


def read_lora(path: Path, modules: Iterable[str]) -> dict[str, LoRAWeights]:
    """The weights in a LoRA file by official module path, in the file's number format.

    `modules` are the official paths that exist (`candidates(model)`). A missing alpha means alpha = rank. Raises
    `CheckpointError` if the file is no LoRA or if any of its keys fits no module.
    """
    file, known = read_file(path), tuple(modules)
    if file.differences:
        raise CheckpointError(
            f"{path} also holds whole weight differences ({few(list(file.differences))}), which a LoRA cannot go on "
            "from; merge it into the model with --base_weights"
        )
    paths = resolve(file.loras, known)
    require_known(path, [name for name, meant in paths.items() if meant is None], known)
    found = {meant: file.loras[name] for name, meant in paths.items() if meant is not None}
    if len(found) < len(file.loras):
        raise CheckpointError(f"{path} names some modules twice, in two spellings; which one is meant cannot be told")
    return found


def require_known(path: Path, unknown: list[str], modules: Iterable[str]) -> None:
    """Raise `CheckpointError` naming the modules of a file that the model does not have, if there are any."""
    if unknown:
        raise CheckpointError(
            f"{path}: {len(unknown)} of its modules are not in this model ({few(unknown)})"
            f"{did_you_mean(unknown[0], modules)}; the file belongs to another model, or its trainer adapted layers "
            "that are not adapted here"
        )


def shapes_from_weights(path: Path, modules: Iterable[str]) -> tuple[dict[str, int], dict[str, float]]:
    """Rank and alpha of every module in a LoRA file, to give to `inject` (`--dim_from_weights`)."""
    weights = read_lora(path, modules)
    return {name: w.rank for name, w in weights.items()}, {name: w.alpha for name, w in weights.items()}


def save_lora(
    path: Path,
    network: LoRANetwork,
    *,
    format: str = "kohya",
    dtype: torch.dtype = torch.float32,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the adapters in one of the `SPELLINGS`, with hashes among the metadata; then prove the file.

    Raises `CheckpointError`, leaving no file and any older one of that name untouched, if a weight is not finite, does
    not fit `dtype`, or does not come back as it is.
    """
    live = {
        name: LoRAWeights(w.down.to("cpu", torch.float32), w.up.to("cpu", torch.float32), w.alpha)
        for name, w in network.weights().items()
    }
    tensors = SPELLINGS.get(format).tensors(live, dtype)
    _require_finite(path, tensors, dtype)
    complete = {**(metadata or {}), **model_hashes(tensors, metadata or {})}
    with atomic_path(path) as temporary:
        save_tensors(temporary, tensors, complete)
        _prove(path, read_lora(temporary, candidates(network.model)), live, dtype)
    log.info(f"saved {path} ({format}, {dtype_name(dtype)}); {len(live)}/{len(live)} modules map to the model")
    if network.is_partial:
        warn_partial(format)


def warn_partial(format: str) -> None:
    """Say once where a file in this spelling that adapts only some linear layers cannot be used."""
    if format == "kohya":
        warn_once(
            "Diffusers reads LoRAs in the kohya spelling only if all linear layers of all blocks are trained; for use "
            "there, save this selection with --save_format diffusers or comfy (ComfyUI reads all three)"
        )


def _sort_keys(source: TensorSource) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Keys of the factors and alphas by module, and the keys of whole differences."""
    parts: dict[str, dict[str, str]] = {}
    differences, unknown = [], []
    for key in source.names:
        for mark, kind in _FOREIGN.items():
            if mark in key:
                raise CheckpointError(
                    f"{source.path} is a {kind} file ({key}); only plain LoRA files (lora_down and lora_up, or lora_A "
                    "and lora_B) can be read here"
                )
        match split_key(key):
            case None:
                unknown.append(key)
            case (_, "diff" | "diff_b"):
                differences.append(key)
            case (module, part):
                found = parts.setdefault(module, {})
                if part in found:
                    raise CheckpointError(f"{source.path} has two adapters in one file: {found[part]} and {key}")
                found[part] = key
    if unknown:
        raise CheckpointError(
            f"{source.path}: {len(unknown)} of {len(source.names)} keys are not those of a LoRA ({few(unknown)})"
        )
    if not parts and not differences:
        raise CheckpointError(f"{source.path} holds no LoRA")
    return parts, differences


def _weights(
    path: Path, module: str, keys: Mapping[str, str], source: TensorSource, declared: "_DeclaredAlphas | None"
) -> LoRAWeights:
    if "down" not in keys or "up" not in keys:
        raise CheckpointError(f"{path} is not whole: {module} has only {', '.join(keys.values())}; save it again")
    # Copies: a tensor that still maps the file would keep Windows from replacing it.
    down, up = source.read(keys["down"]).clone(), source.read(keys["up"]).clone()
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1]:
        raise CheckpointError(
            f"{path}: the factors of {module} are {list(down.shape)} and {list(up.shape)}; those of a linear layer are "
            "[rank, in] and [out, rank]"
        )
    rank = down.shape[0]
    if "alpha" in keys:
        alpha = float(source.read(keys["alpha"]).item())
    else:
        alpha = declared.alpha(module, rank) if declared else float(rank)
    return LoRAWeights(down, up, alpha)


@dataclass(frozen=True, slots=True)
class _DeclaredAlphas:
    """Alphas that PEFT keeps in the metadata instead of in tensors."""

    default: float
    patterns: Mapping[str, float]
    rank_stabilised: bool

    def alpha(self, module: str, rank: int) -> float:
        """The alpha whose quotient with `rank` is the module's scale."""
        matching = [value for pattern, value in self.patterns.items() if re.match(rf"(.*\.)?({pattern})$", module)]
        alpha = float(matching[0] if matching else self.default)
        return alpha * rank**0.5 if self.rank_stabilised else alpha


def _declared_alphas(metadata: Mapping[str, str]) -> _DeclaredAlphas | None:
    """What Diffusers writes as `lora_adapter_metadata`."""
    try:
        config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        config = {key.removeprefix("transformer."): value for key, value in config.items()}
        if "lora_alpha" not in config:
            return None
        return _DeclaredAlphas(
            float(config["lora_alpha"]), config.get("alpha_pattern") or {}, bool(config.get("use_rslora"))
        )
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"the metadata key lora_adapter_metadata of a LoRA file cannot be read ({error})"
        ) from error


def _require_finite(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise CheckpointError(
            f"{path} was not written: {len(broken)} of {len(tensors)} tensors hold NaN or infinity in "
            f"{dtype_name(dtype)} ({few(broken)}). The training has gone wrong (lower the learning rate and go on "
            "from an earlier file), or the weights are too large for this --save_precision"
        )


def _prove(path: Path, stored: Mapping[str, LoRAWeights], live: Mapping[str, LoRAWeights], dtype: torch.dtype) -> None:
    """Raise `CheckpointError` unless every stored update acts as the live one, up to rounding to `dtype`."""
    if set(stored) != set(live):
        odd = sorted(set(stored) ^ set(live))
        raise CheckpointError(f"{path} was not written: read back, it does not hold the same modules ({few(odd)})")
    generator = torch.Generator().manual_seed(0)
    for name, want in live.items():
        x = torch.randn(want.down.shape[1], generator=generator, dtype=torch.float64)
        error = (stored[name].applied(x) - want.applied(x)).abs()
        if not bool((error <= _rounding_bound(want, x, dtype)).all()):
            raise CheckpointError(
                f"{path} was not written: read back, the update of {name} differs by up to {error.max():.3g} from the "
                "one in training; check the disk, or use another --save_precision"
            )


def _rounding_bound(weights: LoRAWeights, x: Tensor, dtype: torch.dtype) -> Tensor:
    """How far rounding both factors to `dtype` can move `weights.applied(x)`, with a margin of two."""
    kind = torch.finfo(dtype)
    down, up, x = weights.down.double().abs(), weights.up.double().abs(), x.abs()
    moved_down, moved_up = down * kind.eps + kind.smallest_normal * kind.eps, up * kind.eps
    # An alpha that is folded into a factor is rounded too, and its smallest steps grow when it is taken out again.
    moved_up = moved_up + kind.smallest_normal * kind.eps * max(1.0, 1 / abs(weights.scale))
    return 2 * abs(weights.scale) * (moved_up @ (down @ x) + up @ (moved_down @ x) + moved_up @ (moved_down @ x))
