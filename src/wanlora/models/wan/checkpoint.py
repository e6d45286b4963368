"""Reading a transformer from any file that users have of it.

A file is first inspected by its header: where the transformer is in it, how its tensors are named, which member of the
family it is, which weights have scales. Then the model is built without memory (meta device) and filled tensor by
tensor, so that the host never holds a second copy, and a hook may change a tensor (`adjust`: merged adapters) or decide
what becomes of it (`install`: quantised weights) while it is the only one in hand.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Never

import torch
from torch import Tensor
from tqdm import tqdm

from wanlora.foundation.blank import without_memory
from wanlora.foundation.dtypes import dtype_name
from wanlora.foundation.errors import CheckpointError
from wanlora.foundation.log import log, say_once
from wanlora.foundation.tensor_files import TensorSource, open_tensors
from wanlora.models.wan.detect import FAMILIES, check_fits_task, family_of
from wanlora.models.wan.keys import diffusers_to_official, find_prefix
from wanlora.models.wan.layers import Float32Linear
from wanlora.models.wan.recognise import describe
from wanlora.models.wan.scaled import FP8_DTYPES, dequantise, require_scale
from wanlora.models.wan.spec import TASKS, WanSizes
from wanlora.models.wan.transformer import WanTransformer
from wanlora.models.wan.weights import put, require_names, require_shapes

Adjust = Callable[[str, Tensor], Tensor]
"""Gets a tensor's official name and value, returns the value to load."""
Install = Callable[[WanTransformer, str, Tensor, Tensor | None], None]
"""Puts one tensor (and the scale it is stored with) into the model, under its official name."""

_SCALES = (".scale_weight", ".weight_scale")
_IGNORED = (".scale_input", ".input_scale", ".comfy_quant", "scaled_fp8")
"""Scales of activations and notes on formats; a weight is read by its own dtype and the shape of its scale."""
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformerFile:
    """What the header of a checkpoint says."""

    path: Path
    layout: str
    """How tensors are named: official or diffusers."""
    prefix: str
    """What stands before every name."""
    family: str
    """Kind of graph, a key of `detect.FAMILIES`."""
    sizes: WanSizes
    dtypes: tuple[torch.dtype, ...]
    """Number formats of the weights, the one with most elements first."""
    tensors: Mapping[str, str]
    """Stored name of every tensor, by official name."""
    scales: Mapping[str, str]
    """Stored name of the scale of every weight that has one, by official name of the weight."""

    @property
    def scaled(self) -> bool:
        """Whether weights are stored with scales."""
        return bool(self.scales)


def inspect_transformer(source: TensorSource) -> TransformerFile:
    """Recognise a transformer by its header; no tensor is read.

    Raises `CheckpointError` for any other kind of file, saying what it is, and for formats that cannot be read.
    """
    found = find_prefix(source.names)
    if found is None:
        raise CheckpointError(
            f"{source.path} {describe(source.names)}; --dit wants a whole Wan transformer, such as "
            f"{TASKS['t2v-14B'].file}"
        )
    prefix, layout = found
    tensors, scales = _official_names(source, prefix, layout)
    _check_formats(source, tensors, scales)
    shapes = {name: source.shape(stored) for name, stored in tensors.items()}
    try:
        sizes = WanSizes.from_shapes(shapes)
    except CheckpointError as error:
        raise CheckpointError(f"{source.path}: {error}") from error
    return TransformerFile(
        path=source.path,
        layout=layout,
        prefix=prefix,
        family=family_of(shapes, sizes),
        sizes=sizes,
        dtypes=_dtypes_by_share(source, tensors),
        tensors=tensors,
        scales=scales,
    )


def check_task(file: TransformerFile, task: str) -> None:
    """Raise `CheckpointError` if the file is not what `task` trains, `ConfigError` if there is no such task."""
    check_fits_task(file.path, file.family, file.sizes, task)


def install_parameter(model: WanTransformer, name: str, tensor: Tensor, scale: Tensor | None) -> None:
    """Make `tensor` the parameter `name`, where it is, in the dtype that the parameter is declared in.

    A scale is multiplied in. The matrices of the float32 islands stay in 16 bits if the file has them so: they are
    widened where they are used, without loss, and in a 14B model that saves 0.4 GB.
    """
    if scale is not None:
        tensor = _scaled(name, tensor, scale)
    dtype = model.get_parameter(name).dtype
    island = isinstance(model.get_submodule(name.rpartition(".")[0]), Float32Linear)
    if island and tensor.ndim == 2 and tensor.dtype in (torch.bfloat16, torch.float16):
        dtype = tensor.dtype
    put(model, name, tensor.to(dtype, copy=True))  # a copy: what was read may be a window into the file


def load_transformer(
    path: Path,
    task: str,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    adjust: Adjust | None = None,
    install: Install = install_parameter,
    residual_dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    progress: bool = True,
) -> WanTransformer:
    """Read the transformer at `path`; every parameter is frozen.

    Each tensor is moved to `device`, handed to `adjust`, then to `install`, which puts it into the model: there by
    default, in another place or form if it likes. `dtype` is the model's compute dtype. With `adjust`, 8-bit weights
    are widened first.
    Raises `CheckpointError` for a file of another kind, with missing, foreign or ill-shaped tensors.
    """
    with open_tensors(path) as source:
        file = inspect_transformer(source)
        check_task(file, task)
        with without_memory():
            model = WanTransformer(file.sizes, compute_dtype=dtype, residual_dtype=residual_dtype, attention=attention)
        check_complete(source, file, model)
        begin = time.perf_counter()
        with _progress_bar(source, file, progress) as bar:
            for name, tensor, scale in _tensors(source, file, torch.device(device)):
                install(model, name, *(_adjusted(adjust, name, tensor, scale) if adjust else (tensor, scale)))
                bar.update(_num_bytes(source, file.tensors[name]))
        log.info(_speed(source, file, time.perf_counter() - begin))
    return _frozen(model)


def _official_names(source: TensorSource, prefix: str, layout: str) -> tuple[dict[str, str], dict[str, str]]:
    """Stored names of tensors and of scales, by official name."""
    translate = diffusers_to_official if layout == "diffusers" else str
    tensors, scales, foreign = {}, {}, 0
    for stored in source.names:
        name = stored.removeprefix(prefix)
        if name.endswith(_IGNORED) or (layout == "diffusers" and ".norm_added_q." in name):
            continue
        if not stored.startswith(prefix):
            foreign += 1
        elif name.endswith(_SCALES):
            scales[translate(name.rpartition(".")[0]) + ".weight"] = stored
        else:
            tensors[translate(name)] = stored
    if foreign:
        say_once(f"{source.path}: {foreign} tensors outside {prefix}* belong to other models and are not read")
    return tensors, scales


def _check_formats(source: TensorSource, tensors: Mapping[str, str], scales: Mapping[str, str]) -> None:
    """Refuse integers, 4-bit formats and scales that do not fit, before anything is read."""
    used = [(stored, (*_FLOATS, *FP8_DTYPES)) for stored in tensors.values()]
    for stored, readable in used + [(stored, _FLOATS) for stored in scales.values()]:
        if source.dtype(stored) not in readable:
            raise CheckpointError(
                f"{source.path}: {stored} is stored as {dtype_name(source.dtype(stored))}, a quantised format that is "
                "not read here; use the bf16, fp16, fp8 or fp8_scaled version of the model"
            )
    for name in scales.keys() & tensors.keys():
        _spread(f"{source.path}: {name}", source.shape(tensors[name]), source.shape(scales[name]))


def _dtypes_by_share(source: TensorSource, tensors: Mapping[str, str]) -> tuple[torch.dtype, ...]:
    shares: Counter[torch.dtype] = Counter()
    for stored in tensors.values():
        shares[source.dtype(stored)] += prod(source.shape(stored))
    return tuple(dtype for dtype, _ in shares.most_common())


def check_complete(source: TensorSource, file: TransformerFile, model: WanTransformer) -> None:
    """Raise `CheckpointError` unless every parameter has its tensor, of its shape, and nothing is left over."""
    what = f"{FAMILIES[file.family]} of {file.sizes.num_layers} blocks"
    require_names(file.path, what, model.state_dict(), file.tensors.keys() | file.scales.keys())
    require_shapes(source, what, model, file.tensors)


def _tensors(
    source: TensorSource, file: TransformerFile, device: torch.device
) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Official name, tensor and scale of everything in the file, in its order, on `device`."""
    owners = {stored: name for names in (file.tensors, file.scales) for name, stored in names.items()}
    halves: dict[str, dict[str, Tensor]] = {}
    for stored, tensor in source.read_all(owners, lambda stored: device):
        name = owners[stored]
        if name not in file.scales:
            yield name, tensor, None
            continue
        both = halves.setdefault(name, {})
        both["scale" if stored == file.scales[name] else "weight"] = tensor
        if len(both) == 2:
            del halves[name]
            yield name, both["weight"], both["scale"]


def _adjusted(adjust: Adjust, name: str, tensor: Tensor, scale: Tensor | None) -> tuple[Tensor, None]:
    """What `adjust` makes of the weight that is meant."""
    if scale is not None:
        tensor = _scaled(name, tensor, scale)
    elif tensor.dtype in FP8_DTYPES:
        tensor = tensor.float()
    return adjust(name, tensor), None


def _scaled(name: str, weight: Tensor, scale: Tensor) -> Tensor:
    """The weight that is meant, in float32. A scale for blocks of rows is first spread over the rows."""
    times = _spread(name, weight.shape, scale.shape)
    return dequantise(weight, (scale.repeat_interleave(times, dim=0) if times > 1 else scale).float())


def _spread(name: str, weight: Sequence[int], scale: Sequence[int]) -> int:
    """How many rows of a weight a row of its scale is for. Raises `CheckpointError` if their shapes do not fit.

    Told from the shapes alone: on tensors of the meta device the same sums would make torch import its compiler.
    """
    times = 1
    if len(weight) == len(scale) == 2 and scale[0] and weight[0] % scale[0] == 0:
        times = weight[0] // scale[0]
        scale = (weight[0], scale[1])
    try:
        if len(scale) > 2 and tuple(scale[2:]) != (1,):
            raise ValueError(f"a scale of shape {tuple(scale)} is of no known kind")
        require_scale(weight, scale)
    except ValueError as error:
        raise CheckpointError(f"{name} cannot be scaled: {error}; use another version of the model") from error
    return times


def _num_bytes(source: TensorSource, stored: str) -> int:
    return prod(source.shape(stored)) * source.dtype(stored).itemsize


def _total_bytes(source: TensorSource, file: TransformerFile) -> int:
    return sum(_num_bytes(source, stored) for stored in file.tensors.values())


def _speed(source: TensorSource, file: TransformerFile, seconds: float) -> str:
    gigabytes = _total_bytes(source, file) / 1e9
    return f"{file.path.name}: {gigabytes:.1f} GB read in {seconds:.1f} s ({gigabytes / max(seconds, 1e-3):.1f} GB/s)"


def _progress_bar(source: TensorSource, file: TransformerFile, progress: bool) -> "tqdm[Never]":
    total = _total_bytes(source, file)
    return tqdm(total=total, unit="B", unit_scale=True, desc=f"loading {file.path.name}", disable=not progress)


def _frozen(model: WanTransformer) -> WanTransformer:
    """Check that nothing was left without memory, and freeze."""
    empty = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if empty:
        raise RuntimeError(f"{len(empty)} tensors were not installed: {', '.join(empty[:3])}")
    return model.requires_grad_(False)
