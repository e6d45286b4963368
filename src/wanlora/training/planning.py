"""Planning a run: for the card in this machine, or for one that is named."""

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Literal

import torch

from wanlora.config.planning import PlannedConfig, PlanningConfig
from wanlora.config.train import MemoryConfig, TrainConfig
from wanlora.data.report import report_lines
from wanlora.foundation.devices import find_device
from wanlora.foundation.errors import ConfigError
from wanlora.foundation.files import write_json
from wanlora.foundation.laps import start
from wanlora.foundation.log import log
from wanlora.memory.cards import Card, detect_card, find_card
from wanlora.memory.choices import Swapping, best_swapped, fits
from wanlora.memory.host import available_host_memory
from wanlora.memory.limit import default_reserve
from wanlora.memory.measure import GIB
from wanlora.memory.outlook import Load
from wanlora.training.announce import run_length
from wanlora.training.build import fp8_weights, wants_compile
from wanlora.training.engine import compute_dtype
from wanlora.training.plan import (
    RunPlan,
    Target,
    batches_of,
    drawing_bytes,
    host_for_blocks,
    make_outlook,
    make_plan,
)
from wanlora.training.plan_report import plan_lines, plan_record
from wanlora.training.position import steps_per_epoch
from wanlora.training.prepare import Prepared, prepare

AUTO = "auto"
_SHOWN_SIZES = 6
_CONTEXT = int(0.6 * GIB)
"""What CUDA and its libraries take of a card outside of PyTorch's allocator, about."""


def plan_run(config: PlannedConfig) -> None:
    """Check the run but for its caches and log its plan. Raises a `UserError` for everything that the user can mend."""
    planning = config.planning
    if planning.card is not None and planning.vram is not None:
        raise ConfigError("--card and --vram both say how much memory there is; give one of them")
    target = _named_target(config, planning)
    prepared = prepare(config, caches=False)
    for line in report_lines(prepared.plan):
        log.info(line)
    log.info(f"training {config.model.task} for {run_length(config, prepared)}")
    if target is None:
        target = present_target(config)
        if target.total is None:
            log.info('there is no CUDA card here: plan for another machine with --card "RTX 4090" or --vram 24')
    plan = log_plan(*settle(config, prepared, target), target)
    if planning.json is not None:
        write_json(planning.json, plan_record(plan))
        log.info(f"saved {planning.json}")


def card_to_start(config: TrainConfig) -> int | None:
    """The number of the card that this process will use; None without one and where the flags are wrong."""
    with start.part("card"), suppress(ConfigError):  # which is said with all else that is wrong
        device = _device(config)
        return device.index if device.type == "cuda" else None
    return None


def present_target(config: TrainConfig) -> Target:
    """The card that this process would train on, or the processor."""
    device = _device(config)
    compiled, fp8 = wants_compile(config.memory, device), fp8_weights(config.memory, device)
    if device.type != "cuda":
        name = "the processor, without a card"
        return Target(name=name, compiled=compiled, fp8=fp8, streams=False, host_free=available_host_memory())
    free, total = torch.cuda.mem_get_info(device)
    return Target(
        name=f"the {torch.cuda.get_device_name(device)} here",
        total=total,
        room=usable_room(free, config.memory),
        rates=detect_card(device),
        compiled=compiled,
        fp8=fp8,
        host_free=available_host_memory(),
    )


def settle(config: TrainConfig, prepared: Prepared, target: Target) -> tuple[TrainConfig, Prepared]:
    """The settings without `auto`: the numbers of swapped blocks with which every size fits and all of them take least
    time, and whether weights are kept transposed for fp8 maths. What was decided is said.

    The config has the largest of the numbers; `Prepared.swapped` those of each size, if they differ.
    """
    if config.memory.blocks_to_swap == AUTO:
        choice = _swapped(config, prepared, target)
        config = replace(config, memory=replace(config.memory, blocks_to_swap=choice.number))
        prepared = replace(prepared, swapped=choice.by_size)
    return _with_transposed(config, prepared, target), prepared


def _with_transposed(config: TrainConfig, prepared: Prepared, target: Target) -> TrainConfig:
    asked = config.memory.fp8_fast_transposed
    if target.fp8 != "rows" and config.memory.fp8_fast and asked == "on":
        log.warning("--fp8_fast_transposed on: not done, because nothing is multiplied in fp8")
    if target.fp8 != "rows" or asked == "off":
        return config
    transposed: Literal["on", "off"] = "on" if _transposes(config, prepared, target) else "off"
    return replace(config, memory=replace(config.memory, fp8_fast_transposed=transposed))


def _transposes(config: TrainConfig, prepared: Prepared, target: Target) -> bool:
    asked = config.memory.fp8_fast_transposed
    outlook = make_outlook(config, prepared, target, dtype=_dtype(config, prepared))
    if outlook.streamed:
        if asked == "on":
            log.warning(f"--fp8_fast_transposed on: not done, because {outlook.swapped} blocks are swapped")
        return False
    outlook = replace(outlook, transposed=True)
    size = f"{outlook.transposed_bytes / GIB:.1f} GiB"
    if asked == "on":
        log.info(f"--fp8_fast_transposed on: weights are kept transposed as well, {size}")
        return True
    if target.room is None:
        return False
    everything, loads = replace(outlook, recompute=False), batches_of(prepared.plan)
    besides = drawing_bytes(config.model, prepared, outlook)
    room = fits(everything, loads, target.room, besides=besides)
    needs = max(*map(everything.peak, loads), sum(everything.resting().values()) + besides) / GIB
    log.info(
        f"--fp8_fast_transposed auto: weights are {'' if room else 'not '}kept transposed as well, {size}; "
        f"with nothing recomputed {needs:.1f} of {target.room / GIB:.1f} GiB would be needed"
    )
    return room


def _swapped(config: TrainConfig, prepared: Prepared, target: Target) -> Swapping:
    if target.room is None:
        log.info("--blocks_to_swap auto: 0, because without a CUDA card all weights are in system memory")
        return Swapping(number=0, fewest=0)
    outlook = make_outlook(config, prepared, target, dtype=_dtype(config, prepared))
    batches, besides = batches_of(prepared.plan), drawing_bytes(config.model, prepared, outlook)
    host = host_for_blocks(config, prepared, target)
    choice = best_swapped(outlook, batches, target.room, target.rates, besides=besides, host=host)
    taken = choice or Swapping(number=outlook.num_blocks - outlook.ring, fewest=0)
    chosen = taken.applied(outlook)
    needs = max(*map(chosen.peak, batches), sum(chosen.resting().values()) + besides) / GIB
    figures = f"{needs:.1f} of {target.room / GIB:.1f} GiB are needed"
    if choice is None:
        log.warning(f"--blocks_to_swap auto: {chosen.swapped}, which are all, and still {figures}")
    else:
        without = max(*map(outlook.peak, batches), sum(outlook.resting().values()) + besides) / GIB
        less = f", {without:.1f} with none swapped" if choice.number else ""
        log.info(f"--blocks_to_swap auto: {_reason(choice, outlook.num_blocks)}; {figures}{less}")
    return taken


def _reason(choice: Swapping, num_blocks: int) -> str:
    if choice.by_size:
        return (
            f"{_numbers(choice.by_size)} of {num_blocks} blocks are swapped, {choice.fewest} would fit; this is "
            f"foretold to take {choice.gain:.0%} less time than {choice.alike} for every size"
        )
    if choice.number == choice.fewest:
        return str(choice.number)
    return (
        f"{choice.number} of {num_blocks} blocks are swapped: {choice.fewest} would fit, {choice.number} are foretold "
        f"to take {choice.gain:.0%} less time"
    )


def _numbers(by_size: Mapping[Load, int]) -> str:
    """`0 for 1248 tokens, 28 for 7488`; of many sizes the range."""
    if len(by_size) > _SHOWN_SIZES:
        return f"{min(by_size.values())} to {max(by_size.values())}, each of {len(by_size)} sizes its own number,"
    first, *others = sorted((load.tokens * load.batch, number) for load, number in by_size.items())
    return ", ".join([f"{first[1]} for {first[0]} tokens", *(f"{number} for {tokens}" for tokens, number in others)])


def log_plan(config: TrainConfig, prepared: Prepared, target: Target) -> RunPlan:
    """Log the plan of a run on `target`; `config` is settled."""
    plan = make_plan(config, prepared, target, dtype=_dtype(config, prepared))
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    steps = steps_per_epoch(prepared.plan.num_batches, config.run.gradient_accumulation_steps * processes)
    for line in plan_lines(plan, steps=steps, epochs=_epochs(config, prepared, steps), processes=processes):
        log.info(line)
    return plan


def _epochs(config: TrainConfig, prepared: Prepared, steps: int) -> float:
    """How many epochs are left, in parts."""
    start, length = prepared.start, prepared.plan.num_batches
    if config.run.max_train_epochs is None:
        return max(config.run.max_train_steps - start.step, 0) / steps
    return max(config.run.max_train_epochs - start.epoch - start.batch / length, 0)


def _named_target(config: TrainConfig, planning: PlanningConfig) -> Target | None:
    if planning.card is None and planning.vram is None:
        return None
    card: Card | None = None if planning.card is None else find_card(planning.card)
    memory = planning.vram if card is None else card.memory
    assert memory is not None
    total = int(memory * GIB)
    return Target(
        name="a card" if card is None else card.name,
        total=total,
        room=usable_room(total - _CONTEXT, config.memory),
        rates=card,
        compiled=config.memory.compile is not False,
        fp8="rows" if config.memory.fp8_fast and (card is None or card.fp8) else config.memory.fp8_mode,
    )


def _device(config: TrainConfig) -> torch.device:
    device = find_device(config.run.device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return device


def _dtype(config: TrainConfig, prepared: Prepared) -> torch.dtype:
    return compute_dtype(config.run.mixed_precision, prepared.transformer.dtypes[0], _device(config))


def usable_room(free: int, memory: MemoryConfig) -> int:
    """What tensors can hold of what is free."""
    reserve = default_reserve() if memory.vram_reserve is None else memory.vram_reserve
    usable = free - int(reserve * GIB)
    if memory.vram_limit is not None:
        usable = min(usable, int(memory.vram_limit * GIB))
    return max(int(0.96 * usable), 0)
