"""Fp8 maths are measured on the run's own data before they train anything.

They round activations to three bits of mantissa. How much that costs depends on the activations, so it is measured and
printed at every start: the error of each layer's output, then the loss and the direction of the adapters' gradient,
each against bf16 maths on the same fp8 weights. A layer that errs too much keeps bf16 maths.

Which layers those are is decided on the base model and the first epoch's batches, whatever the state of the training:
a resumed run decides as the first did. Adapters that have not been trained change nothing, so one pass in bf16 maths
serves for the layers and for the gradient; where they have been, the layers get a pass of their own. Blocks are run as
plain Python here, so that nothing is compiled for a measurement, and all of them are recomputed.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from statistics import median
from typing import TypeVar

import torch
from torch import Tensor

from wanlora.data.dataset import Batch, CachedBatches
from wanlora.data.order import BatchSpec
from wanlora.data.plan import DataPlan
from wanlora.foundation.errors import few
from wanlora.foundation.laps import start
from wanlora.foundation.log import log
from wanlora.foundation.shapes import LatentShape, PixelShape
from wanlora.generation.pipeline import evaluating
from wanlora.memory.checkpointing import Recompute
from wanlora.memory.compile import is_compiled
from wanlora.memory.measure import is_out_of_memory
from wanlora.models.wan.transformer import WanTransformer
from wanlora.quantization.fast_linear import FastFp8Linear, fast_layers, wide_maths
from wanlora.quantization.maths_error import Difference, LayerErrors, compare_maths
from wanlora.training.build import Trainee
from wanlora.training.engine import Engine
from wanlora.training.objective import FlowObjective
from wanlora.training.step import IndexedBatch

MOST_ERROR = 0.08
"""Of a layer's output, relative to its norm. Normally distributed numbers give 0.026."""
MOST_LOSS_ERROR, LEAST_COSINE = 0.01, 0.98
"""What counts as the same training; beyond is a warning."""
Result = TypeVar("Result")


def sample_batches(plan: DataPlan, order: Sequence[BatchSpec]) -> list[IndexedBatch]:
    """The first batch of an epoch in up to two sizes: the smallest, and one from the middle up.

    The largest would take most of the time and may not fit where only compiled blocks do. Errors hardly depend on it:
    every token is rounded on its own.
    """
    first: dict[PixelShape, int] = {}
    for index, spec in enumerate(order):
        first.setdefault(spec.pixels, index)
    sizes = sorted(first, key=lambda pixels: LatentShape.of(pixels).num_tokens)
    larger = sizes[min((len(sizes) + 1) // 2, len(sizes) - 1)]
    dataset = CachedBatches.of(plan)
    chosen = dict.fromkeys((sizes[0], larger))
    return [IndexedBatch(first[pixels], dataset[order[first[pixels]]]) for pixels in chosen]


def check_fp8_maths(
    trainee: Trainee, objective: FlowObjective, batches: Sequence[IndexedBatch], engine: Engine
) -> None:
    """Measure and print what fp8 maths change, and turn them off in layers that err too much. `batches` of epoch 0."""
    begin = time.perf_counter()
    layers = fast_layers(trainee.model)
    with _measuring(trainee.model):
        measured = LayerErrors(layers)
        if _is_trained(trainee):
            _measure_base(trainee, objective, batches, measured)
            differences = [_difference(trainee, objective, item) for item in batches]
        else:
            differences = [_difference(trainee, objective, item, measured) for item in batches]
        errors = engine.from_main({_plain(name): error for name, error in measured.result().items()})
        if not errors:
            return
        _report_layers(errors)
        bad = [name for name, error in errors.items() if not error <= MOST_ERROR]
        if bad:
            _widen(layers, bad)
            differences = [_difference(trainee, objective, item) for item in batches]
    for difference, item in zip(differences, batches, strict=True):
        if difference is not None:
            _report(difference, item.batch)
    log.info(f"fp8 maths were measured in {time.perf_counter() - begin:.1f} s")
    if engine.device.type == "cuda":
        torch.cuda.empty_cache()  # compiled blocks ask for other sizes than these did


@contextmanager
def _measuring(model: WanTransformer) -> Iterator[None]:
    """Blocks as plain Python, all recomputed, without dropout."""
    runner, model.run_block = model.run_block, Recompute(list(model.blocks))
    try:
        with evaluating(model), _uncompiled(model):
            yield
    finally:
        model.run_block = runner


def _uncompiled(model: WanTransformer) -> AbstractContextManager[None]:
    """Where nothing is compiled, torch is not asked, because that would import its compiler."""
    return torch.compiler.set_stance("force_eager") if any(map(is_compiled, model.blocks)) else nullcontext()


def _is_trained(trainee: Trainee) -> bool:
    """Whether the adapters change anything yet. Waits for the device."""
    factors = [adapter.lora_up.weight for adapter in trainee.network.adapters.values()]
    return bool(torch.stack(torch._foreach_norm([factor.detach() for factor in factors])).any())


def _measure_base(
    trainee: Trainee, objective: FlowObjective, batches: Sequence[IndexedBatch], errors: LayerErrors
) -> None:
    """The errors of layers on the model without its adapters, in a pass that serves nothing else."""
    wide = partial(wide_maths, errors.layers.values())
    for item in batches:
        with errors, wide(), trainee.network.enabled(False), torch.no_grad():
            _if_it_fits(partial(_loss, objective, item), trainee, item.batch)


def _report_layers(errors: Mapping[str, float]) -> None:
    worst = max(errors, key=lambda name: errors[name])
    log.info(
        f"fp8 maths: {len(errors)} matrices multiply in fp8; against bf16 maths the outputs err by "
        f"{median(errors.values()):.1%} (median), at most {errors[worst]:.1%} ({worst})"
    )


def _widen(layers: Mapping[str, FastFp8Linear], bad: Sequence[str]) -> None:
    """Turn fp8 maths off in these layers, in the same ones of all blocks that have any: one more graph, not many."""
    kinds: defaultdict[str, set[str]] = defaultdict(set)
    for name in bad:
        block, kind = _split(name)
        kinds[block].add(kind)
    wide = set().union(*kinds.values())
    turned_off = []
    for name, layer in layers.items():
        block, kind = _split(_plain(name))
        if block in kinds and kind in wide:
            layer.kernel = None
            turned_off.append(_plain(name))
    log.warning(
        f"fp8 maths: {len(bad)} layers err by more than {MOST_ERROR:.0%} ({few(bad)}); bf16 maths are kept in "
        f"{len(turned_off)} of {len(layers)} ({', '.join(sorted(wide))} of {len(kinds)} blocks)"
    )


def _difference(
    trainee: Trainee, objective: FlowObjective, item: IndexedBatch, errors: LayerErrors | None = None
) -> Difference | None:
    """What is changed for training on a batch, and with it the `errors` of layers; None if memory does not suffice."""
    loss = partial(_loss, objective, item)
    parameters, layers = trainee.network.parameters(), fast_layers(trainee.model)
    return _if_it_fits(partial(compare_maths, loss, parameters, layers, errors), trainee, item.batch)


def _report(difference: Difference, batch: Batch) -> None:
    line = (
        f"fp8 maths against bf16 maths on {batch.pixels}: loss {difference.loss:.4f} and {difference.exact_loss:.4f} "
        f"({difference.loss_error:+.2%}), cosine of the gradients {difference.cosine:.4f}"
    )
    if abs(difference.loss_error) <= MOST_LOSS_ERROR and difference.cosine >= LEAST_COSINE:
        log.info(line)
    else:
        log.warning(f"{line}; training without --fp8_fast would be more exact")


def _loss(objective: FlowObjective, item: IndexedBatch) -> Tensor:
    return objective(item.batch, 0, item.index).value


def _if_it_fits(measure: Callable[[], Result], trainee: Trainee, batch: Batch) -> Result | None:
    """What `measure` gives; None, which is said, if the card's memory does not suffice for it."""
    try:
        with start.part(str(batch.pixels)):
            return measure()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    log.warning(f"fp8 maths are not measured on {batch.pixels}: the card has too little memory left for that")
    if trainee.stream is not None:
        trainee.stream.reset()
    torch.cuda.empty_cache()
    return None


def _plain(name: str) -> str:
    """A layer's official path, without the adapter around it."""
    return name.removesuffix(".base")


def _split(name: str) -> tuple[str, str]:
    """`blocks.3` and `self_attn.q`."""
    first, number, kind = name.split(".", 2)
    return f"{first}.{number}", kind
