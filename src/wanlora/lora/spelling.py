"""How LoRA files call a module's factors.

| spelling  | keys of `blocks.0.self_attn.q`                                       | alpha  |
|-----------|----------------------------------------------------------------------|--------|
| kohya     | `lora_unet_blocks_0_self_attn_q.lora_down.weight`, `.lora_up.weight` | tensor |
| comfy     | `diffusion_model.blocks.0.self_attn.q.lora_A.weight`, `.lora_B.weight` | tensor |
| diffusers | `transformer.blocks.0.attn1.to_q.lora_A.weight`, `.lora_B.weight`    | folded |

kohya is what musubi writes; ComfyUI and Diffusers read it too, Diffusers only if every linear layer of every block is
there. Diffusers' own spelling has no place for alpha, so alpha / rank is multiplied into the up factor.

Reading turns this round: from the paths of the modules that exist, every name that any trainer may have given them is
made and looked up. Nothing is guessed from underscores, so `k_img` cannot become `k.img`.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from wanlora.foundation.registry import Registry
from wanlora.lora.weights import LoRAWeights
from wanlora.models.wan.keys import official_to_diffusers

_DOTTED_PREFIXES = (
    "",
    "diffusion_model.",
    "model.diffusion_model.",
    "transformer.",
    "base_model.model.",
    "base_model.model.transformer.",
    "model.",
    "pipe.dit.",
)
_UNDERSCORED_PREFIXES = ("lora_unet_", "lora_unet__", "lora_transformer_", "lycoris_")

_FACTOR = re.compile(
    r"^(?P<module>.+?)\.(?:(?P<down>lora_down|lora_A|lora\.down)|(?P<up>lora_up|lora_B|lora\.up))(?:\.[^.]+)?\.weight$"
)
_OTHER = re.compile(r"^(?P<module>.+)\.(?P<part>alpha|diff|diff_b)$")


@dataclass(frozen=True, slots=True)
class Spelling:
    """One way of writing a module's tensors."""

    prefix: str
    down: str
    up: str
    dotted: bool = True
    diffusers_names: bool = False
    keeps_alpha: bool = True

    def module(self, path: str) -> str:
        """What files in this spelling call the module at an official path."""
        name = official_to_diffusers(path) if self.diffusers_names else path
        return self.prefix + (name if self.dotted else name.replace(".", "_"))

    def tensors(self, weights: Mapping[str, LoRAWeights], dtype: torch.dtype) -> dict[str, Tensor]:
        """The content of a file: CPU tensors in `dtype`, alpha always in float32 so that it is exact."""
        tensors: dict[str, Tensor] = {}
        for path, given in weights.items():
            name = self.module(path)
            fold = 1.0 if self.keeps_alpha else given.scale
            up = given.up if fold == 1.0 else given.up * fold
            tensors[f"{name}.{self.down}.weight"] = given.down.to("cpu", dtype).contiguous()
            tensors[f"{name}.{self.up}.weight"] = up.to("cpu", dtype).contiguous()
            if self.keeps_alpha:
                tensors[f"{name}.alpha"] = torch.tensor(given.alpha, dtype=torch.float32)
        return tensors


SPELLINGS: Registry[Spelling] = Registry("LoRA file format")
SPELLINGS.register("kohya")(Spelling("lora_unet_", "lora_down", "lora_up", dotted=False))
SPELLINGS.register("comfy")(Spelling("diffusion_model.", "lora_A", "lora_B"))
SPELLINGS.register("diffusers")(Spelling("transformer.", "lora_A", "lora_B", diffusers_names=True, keeps_alpha=False))


def split_key(key: str) -> tuple[str, str] | None:
    """(module as the file calls it, "down", "up", "alpha", "diff" or "diff_b"), or None for a key of another kind."""
    if match := _FACTOR.match(key):
        return match["module"], "down" if match["down"] else "up"
    if match := _OTHER.match(key):
        return match["module"], match["part"]
    return None


def spellings_of(path: str) -> Iterator[str]:
    """Every name a file may have for the module at an official path."""
    for name in (path, official_to_diffusers(path)):
        yield from (prefix + name for prefix in _DOTTED_PREFIXES)
        yield from (prefix + name.replace(".", "_") for prefix in _UNDERSCORED_PREFIXES)


def resolve(spelled: Iterable[str], modules: Iterable[str]) -> dict[str, str | None]:
    """The official path that each spelled name means among `modules`, or None if it means none of them."""
    meaning = {name: path for path in modules for name in spellings_of(path)}
    return {name: meaning.get(name) for name in spelled}
