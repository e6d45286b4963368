"""Filling a model that was built without memory, tensor by tensor.

A model is made on the meta device, where parameters have shapes and no data. The names that a file lacks or has too
many of and the shapes that differ are found from headers alone; only then is each tensor read, converted and put in its
place, so at no time is there a second copy of the model.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from wanlora.foundation.errors import CheckpointError, few
from wanlora.foundation.tensor_files import TensorSource

_SHOWN = 4


def require_names(path: Path, what: str, expected: Iterable[str], found: Iterable[str]) -> None:
    """Raise `CheckpointError` unless the file has exactly the expected tensors."""
    wanted, present = set(expected), set(found)
    problems = []
    if missing := sorted(wanted - present):
        problems.append(f"lacks {len(missing)} tensors ({few(missing)})")
    if unknown := sorted(present - wanted):
        problems.append(f"has {len(unknown)} unknown tensors ({few(unknown)})")
    if problems:
        raise CheckpointError(f"{path} should be {what}, but {' and '.join(problems)}; fetch the file again")


def require_shapes(source: TensorSource, what: str, model: nn.Module, names: Mapping[str, str]) -> None:
    """Raise `CheckpointError` unless each tensor has its parameter's shape.

    `names` gives the name in the file for each name in the model.
    """
    wrong = [
        f"{names[name]} is {source.shape(names[name])} instead of {tuple(parameter.shape)}"
        for name, parameter in model.state_dict().items()
        if name in names and source.shape(names[name]) != tuple(parameter.shape)
    ]
    if wrong:
        raise CheckpointError(f"{source.path} does not fit {what}: {'; '.join(wrong[:_SHOWN])}; fetch the file again")


def put(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Make `tensor` the frozen parameter or buffer called `name`."""
    owner_name, _, attribute = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    if attribute in owner._buffers:
        owner._buffers[attribute] = tensor
    else:
        setattr(owner, attribute, nn.Parameter(tensor, requires_grad=False))


def fill(
    model: nn.Module, source: TensorSource, names: Mapping[str, str], *, device: torch.device, dtype: torch.dtype
) -> None:
    """Read every tensor that `names` (model name to file name) lists, on `device` in `dtype`."""
    for name, stored_name in names.items():
        # A copy, because what was read may be a window into the file.
        put(model, name, source.read(stored_name).to(device=device, dtype=dtype, copy=True))
