"""The quantised model, kept for the next start.

A start reads 28.6 GB of a 14B model to make 15.4 GB of it, the same every time. With a folder for it the result is
written once and read from then on. What is kept is an ordinary checkpoint: official names, weights in fp8 with their
scales beside them, merged adapters merged. Whatever the installer made of a weight comes back to the bit, because
weights that a file has in fp8 are taken as they are.

The file's metadata say what it was made of. A copy of something else is named and made anew; a file that is no copy of
ours is never touched. A full disk costs the copy and nothing else.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import wanlora
from wanlora.foundation.dtypes import dtype_name
from wanlora.foundation.errors import CheckpointError
from wanlora.foundation.files import fingerprint
from wanlora.foundation.headers import locate, read_header
from wanlora.foundation.log import log
from wanlora.foundation.tensor_files import write_tensors
from wanlora.models.wan.transformer import WanTransformer
from wanlora.quantization.linear import Fp8Linear

_RECIPE = "wanlora_made_of"
_NOTES = "wanlora_notes"


@dataclass(frozen=True, kw_only=True, slots=True)
class KeptCopy:
    """The quantised form of one model under one set of settings."""

    path: Path
    recipe: Mapping[str, Any]
    """What it is made of, as it goes to JSON: the program's version, settings, files with size, time and digest."""

    @classmethod
    def of(
        cls,
        folder: Path,
        model: Path,
        *,
        mode: str,
        dtype: torch.dtype,
        merged: Sequence[tuple[Path, float]] = (),
    ) -> "KeptCopy":
        """The copy in `folder` of the checkpoint at `model`, quantised by `mode` for maths in `dtype`.

        `merged` are LoRA files and their strengths. Raises `CheckpointError` if a file is missing.
        """
        located = locate(model)
        settings = {"mode": mode, "dtype": dtype_name(dtype)}
        strengths = [[str(path.resolve()), factor] for path, factor in merged]
        named = json.dumps([str(located.path.resolve()), settings, strengths])
        digest = hashlib.blake2b(named.encode(), digest_size=4).hexdigest()
        files = [_identity(path) for path in (*located.files, *(path for path, _ in merged))]
        recipe = {"version": wanlora.__version__, **settings, "merged": strengths, "files": files}
        stem = located.path.name.removesuffix(".index.json").removesuffix(".safetensors")
        return cls(path=folder / f"{stem}-fp8-{mode}-{digest}.safetensors", recipe=recipe)

    def difference(self) -> str | None:
        """Why the file cannot be read in place of the model, in words that follow its name; None if it can."""
        if not self.path.is_file():
            return "is missing"
        try:
            made_of = json.loads(read_header(self.path).metadata[_RECIPE])
        except CheckpointError:
            return "is damaged"
        except (KeyError, ValueError):
            return "is another file"
        if made_of == self.recipe:
            return None
        changed = [name for name in self.recipe if made_of.get(name) != self.recipe[name]]
        return f"was made of something else (what differs: {', '.join(changed)})"

    def notes(self) -> list[str]:
        """What the installer said when the copy was made."""
        return read_header(self.path).metadata.get(_NOTES, "").splitlines()

    def write(self, model: WanTransformer, notes: Sequence[str]) -> None:
        """Keep the weights of `model` and what there was to say of them. A disk that refuses is named, no error."""
        if self.difference() == "is another file":
            log.warning(f"{self.path} is not a copy made here and is left alone; the quantised weights are not kept")
            return
        tensors = kept_tensors(model)
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.path.parent).free
            if free < size:
                raise OSError(f"{free / 1e9:.1f} GB are free")
            log.info(f"keeping {size / 1e9:.1f} GB of quantised weights in {self.path} for the next start")
            metadata = {_RECIPE: json.dumps(self.recipe), _NOTES: "\n".join(notes)}
            begin = time.perf_counter()
            write_tensors(self.path, tensors, metadata)
            log.info(f"kept in {time.perf_counter() - begin:.0f} s")
        except OSError as error:
            log.warning(
                f"the quantised weights ({size / 1e9:.1f} GB) could not be kept in {self.path.parent} "
                f"({error.strerror or error}); training goes on without"
            )


def kept_tensors(model: WanTransformer) -> dict[str, Tensor]:
    """Everything to be stored, under official names; scales are called as in ComfyUI's files."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        owner, _, attribute = name.rpartition(".")
        scale = attribute == "scale" and isinstance(model.get_submodule(owner), Fp8Linear)
        tensors[f"{owner}.scale_weight" if scale else name] = tensor
    return tensors


def _identity(path: Path) -> list[object]:
    found = fingerprint(path)
    return [path.name, found.size, found.mtime_ns, found.digest]
