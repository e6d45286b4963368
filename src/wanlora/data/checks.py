"""Do the cache files hold what a plan asks for? Answered before a model is loaded, all problems at once."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

from wanlora.data.cache_files import (
    LATENT_SUFFIX,
    TEXT_SUFFIX,
    LatentName,
    has_image_conditioning,
    latent_is_fresh,
    text_is_fresh,
)
from wanlora.data.items import Item
from wanlora.data.plan import DataPlan
from wanlora.data.sources import some
from wanlora.foundation.errors import DataError

CacheKind = Literal["latents", "text", "all"]
LATENTS_CURE = "run wan_cache_latents.py"
TEXT_CURE = "run wan_cache_text_encoder_outputs.py"
_OTHER_MODEL = re.compile(r".*_\d{4}x\d{4}_(?P<model>[a-z0-9]+)\.safetensors")
_MODELS = {"hv": "HunyuanVideo", "fp": "FramePack"}


def check_caches(
    plan: DataPlan,
    kind: CacheKind = "all",
    *,
    vae: str | None = None,
    vae_dtype: str | None = None,
    channels: int | None = None,
    text_width: int | None = None,
) -> list[str]:
    """What is missing, stale or broken among the cache files of `plan`, one sentence per cause; empty if all is well.

    `channels` and `text_width` are what the model reads. What is None is not compared.
    """
    problems: list[str] = []
    if kind in ("latents", "all"):
        problems += _latent_problems(plan, lambda item: _latent_reason(item, vae, vae_dtype, channels))
    if kind in ("text", "all"):
        by_path = {item.text_path: item for item in plan.cached_items}
        reasons = {
            path: text_is_fresh(path, caption=item.source.caption, width=text_width) for path, item in by_path.items()
        }
        problems += _sentences(reasons, TEXT_CURE)
    return problems


def remarks(plan: DataPlan) -> list[str]:
    """What lies in the cache folders and is not asked for. Nothing of it is ever deleted."""
    asked: dict[Path, set[str]] = {}
    for item in plan.cached_items:
        asked.setdefault(item.latent_path.parent, set()).update({item.latent_path.name, item.text_path.name})
    lines = []
    for folder, names in asked.items():
        beside = sorted(_cache_names(folder) - names)
        if beside:
            lines.append(
                f"{len(beside)} cache files in {folder} are not asked for by {plan.path.name} and are left alone: "
                f"{some(beside)}"
            )
        present = [
            folder / name for name in sorted(names) if name.endswith(LATENT_SUFFIX) and (folder / name).is_file()
        ]
        if present and _holds_conditioning(present[0]):
            lines.append(f"the caches in {folder} also hold image-to-video data; text-to-video training ignores it")
    return lines


def _latent_reason(item: Item, vae: str | None, vae_dtype: str | None, channels: int | None) -> str | None:
    stamp = item.stamp(vae=vae, vae_dtype=vae_dtype)
    return latent_is_fresh(item.latent_path, stamp, item.source.path, channels=channels)


def _latent_problems(plan: DataPlan, reason_of: Callable[[Item], str | None]) -> list[str]:
    asked = {item.latent_path for item in plan.cached_items}
    others = _OtherSizes(asked)
    reasons: dict[Path, str | None] = {}
    for item in plan.cached_items:
        path, reason = item.latent_path, reason_of(item)
        instead = others.of(item) if reason == "is missing" else None
        if instead is not None:
            asks = f"{item.pixels.width}x{item.pixels.height}"
            path, reason = instead[0], f"was cached for {instead[1]}, the dataset now asks for {asks}"
        reasons[path] = reason
    problems = _sentences(reasons, LATENTS_CURE)
    if problems:
        problems += [line for folder in {path.parent for path in asked} for line in _other_models(folder)]
    return problems


def _sentences(reasons: dict[Path, str | None], cure: str) -> list[str]:
    """One sentence per reason, naming the first few files."""
    grouped: dict[tuple[Path, str], list[str]] = {}
    for path, reason in reasons.items():
        if reason is not None:
            grouped.setdefault((path.parent, reason), []).append(path.name)
    sentences = []
    for (folder, reason), names in grouped.items():
        again = cure if reason == "is missing" else f"{cure} again"
        likewise = f", likewise {len(names) - 1} more ({some(names[1:])})" if len(names) > 1 else ""
        sentences.append(f"{folder / names[0]} {reason}{likewise}; {again}")
    return sentences


class _OtherSizes:
    """Finds the cache that a changed resolution has left behind: same source and window, another size."""

    def __init__(self, asked: set[Path]) -> None:
        self.sizes: dict[tuple[Path, str, object], tuple[Path, str]] = {}
        for folder in sorted({path.parent for path in asked}):
            for name in sorted(_cache_names(folder)):
                parsed = LatentName.parse(name)
                if parsed is not None and parsed.window is not None and folder / name not in asked:
                    size = f"{parsed.size[0]}x{parsed.size[1]}"
                    self.sizes[folder, parsed.stem, parsed.window] = folder / name, size

    def of(self, item: Item) -> tuple[Path, str] | None:
        """The file and the size it was cached for."""
        return self.sizes.get((item.latent_path.parent, item.source.stem, item.window)) if item.window else None


def _cache_names(folder: Path) -> set[str]:
    if not folder.is_dir():
        return set()
    names = (path.name for path in folder.iterdir())
    return {name for name in names if name.endswith((LATENT_SUFFIX, TEXT_SUFFIX)) and not name.startswith(".")}


def _other_models(folder: Path) -> Iterable[str]:
    """Caches of other models, which a user may take for these."""
    counts: dict[str, int] = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _OTHER_MODEL.fullmatch(path.name)
        if match is not None and match["model"] != "wan":
            counts[match["model"]] = counts.get(match["model"], 0) + 1
    for model, count in sorted(counts.items()):
        name = _MODELS.get(model, "another model")
        yield f"{folder} holds {count} caches for {name} (…_{model}.safetensors), which Wan cannot use; {LATENTS_CURE}"


def _holds_conditioning(path: Path) -> bool:
    try:
        return has_image_conditioning(path)
    except DataError:
        return False
