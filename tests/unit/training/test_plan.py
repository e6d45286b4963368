"""The plan of a run: what is counted, what is said, and the number that stands for auto."""

import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.runs import TrainingFolder
from tests.unit.training.conftest import Checked
from wanlora.config.train import MemoryConfig, TrainConfig
from wanlora.foundation.log import log
from wanlora.foundation.random import Streams
from wanlora.foundation.shapes import PixelShape
from wanlora.memory.cards import CARDS
from wanlora.memory.checkpointing import Kept
from wanlora.memory.choices import Swapping
from wanlora.memory.outlook import Load
from wanlora.training import planning
from wanlora.training.build import build_trainee, fp8_weights
from wanlora.training.flat import FlatGroups
from wanlora.training.optimizers import OptimizerChoice, choose_optimizer, state_bytes
from wanlora.training.plan import RunPlan, Target, count_buckets, host_for_blocks, make_outlook, make_plan
from wanlora.training.plan_report import duration, plan_lines, plan_record, smaller_clip
from wanlora.training.planning import usable_room
from wanlora.training.prepare import Prepared

MIB = 2**20
Captured = pytest.LogCaptureFixture


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, caplog: Captured) -> Captured:
    """The log of this test."""
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level(logging.INFO, logger="wanlora")
    return caplog


def target(room_mib: float) -> Target:
    return Target(name="a card", total=24 * 2**30, room=int(room_mib * MIB), rates=CARDS["RTX 4090"], compiled=True)


def planned(checked: Checked, room_mib: float, *flags: str) -> RunPlan:
    config, prepared = checked("--mixed_precision", "bf16", *flags)
    card = replace(target(room_mib), fp8=fp8_weights(config.memory, torch.device("cpu")))
    return make_plan(config, prepared, card, dtype=torch.bfloat16)


def lines(plan: RunPlan) -> str:
    return "\n".join(plan_lines(plan, steps=8, epochs=2.5))


def test_batches_are_those_of_an_epoch(checked: Checked) -> None:
    _, prepared = checked()
    counts = count_buckets(prepared.plan)
    assert counts == {
        (PixelShape(48, 32), 2): (3, 2),
        (PixelShape(32, 32), 1): (3, 3),
        (PixelShape(32, 32, 5), 1): (3, 3),
    }
    assert sum(batches for _, batches in counts.values()) == prepared.plan.num_batches


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--fp8_scaled",),
        ("--fp8_scaled", "--fp8_fast"),
        ("--fp8_base", "--network_args", "exclude_patterns=['.*ffn']"),
    ],
)
def test_what_rests_is_what_is_built(checked: Checked, flags: tuple[str, ...]) -> None:
    config, prepared = checked("--mixed_precision", "bf16", *flags)
    here = planning.present_target(config)
    outlook = make_outlook(config, prepared, here, dtype=torch.bfloat16)
    trainee = build_trainee(config, prepared, torch.device("cpu"), Streams(0), quiet=True)
    tensors = [*trainee.model.parameters(), *trainee.model.buffers()]
    frozen = sum(tensor.numel() * tensor.element_size() for tensor in tensors if not tensor.requires_grad)
    assert outlook.trained == trainee.network.num_parameters
    assert outlook.resting()["weights"] == frozen
    flat = FlatGroups(trainee.network.groups(1.0), trainee.network, torch.bfloat16)
    vectors = [vector for one in flat.members for vector in (one.vector, *([one.narrow.vector] if one.narrow else []))]
    assert outlook.resting()["LoRA"] == sum(vector.numel() * vector.element_size() for vector in vectors)


def test_settings_reach_the_plan(checked: Checked) -> None:
    flags = ("--blocks_to_swap", "3", "--block_swap_ring_size", "4", "--gradient_checkpointing", "--network_dim", "6")
    more = (
        "--gradient_checkpointing_cpu_offload",
        "--residual_dtype",
        "bfloat16",
        "--gradient_accumulation_steps",
        "2",
    )
    config, prepared = checked(*flags, *more)
    outlook = make_outlook(config, prepared, target(4000), dtype=torch.float32)
    assert (outlook.swapped, outlook.ring, outlook.streamed) == (3, 4, 7)
    assert outlook.recompute and outlook.offload and outlook.accumulates
    assert (outlook.maths.rank, outlook.maths.residual, outlook.maths.compute) == (6, torch.bfloat16, torch.float32)
    assert not outlook.maths.fp8 and outlook.maths.compiled
    fast = make_outlook(config, prepared, replace(target(4000), fp8="rows"), dtype=torch.bfloat16)
    assert fast.maths.fp8 and fast.fp8_products and fast.formats.scales == "rows"
    assert fast.maths.narrow and not outlook.maths.narrow
    by_matrix = make_outlook(*checked("--optimizer_type", "Muon"), target(4000), dtype=torch.bfloat16)
    assert not by_matrix.maths.narrow


@pytest.mark.parametrize(("name", "expected"), [("adamw", 8), ("adamw8bit", 2), ("SGD", 0)])
def test_an_optimizers_memory_is_found_by_trying(checked: Checked, name: str, expected: float) -> None:
    config, _ = checked("--optimizer_type", name)
    assert state_bytes(choose_optimizer(config.optimizer, {})) == pytest.approx(expected, abs=0.05)


def test_an_optimizer_that_cannot_be_tried_counts_as_adam_and_that_is_said(said: Captured) -> None:
    class OnlyOnCards(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            raise NotImplementedError("no CPU")

    assert state_bytes(OptimizerChoice(name="x", maker=OnlyOnCards, arguments={"lr": 1e-3})) == 8
    assert "--optimizer_type x takes no step on the CPU (NotImplementedError)" in said.text


def test_a_plan_that_fits_says_so(checked: Checked) -> None:
    plan = planned(checked, 2000, "--gradient_checkpointing", "--activation_memory", "auto")
    assert plan.fits and plan.cures == {}
    text = lines(plan)
    assert f"it fits: {plan.largest.pixels} needs" in text
    assert "an epoch: 8 steps" in text and "the run: about" in text
    assert "needs: with every block recomputed" in text
    assert all(str(bucket.pixels) in text for bucket in plan.buckets)
    assert all(bucket.kept == Kept(12, everything=True) for bucket in plan.buckets)
    fast = replace(plan.outlook, fp8_products=True)
    assert fast.most_kept(plan.largest.load, 2000 * 2**30) == Kept(12)


def test_sizes_that_a_slow_host_would_bound_are_named(checked: Checked) -> None:
    plan = planned(checked, 2000)
    assert "0.10 s a batch to queue the kernels, where they are not replayed: see --cuda_graphs" in lines(plan)
    swapping = replace(plan, outlook=replace(plan.outlook, swapped=1))
    assert "0.10 s a batch to queue the kernels, see --compile_cpp_wrapper" in lines(swapping)
    slow = replace(plan, buckets=tuple(replace(bucket, seconds=0.11) for bucket in plan.buckets))
    unknown = replace(plan, buckets=tuple(replace(bucket, seconds=None) for bucket in plan.buckets))
    assert "s a batch" not in lines(slow) + lines(unknown)


def test_a_plan_that_does_not_fit_says_what_would(checked: Checked) -> None:
    roomy = planned(checked, 2000)
    room = (roomy.largest.peak - 1) / MIB
    plan = planned(checked, room)
    assert plan.fits is False
    assert "--gradient_checkpointing" in plan.cures
    text = lines(plan)
    assert "it does not fit" in text and str(plan.largest.pixels) in text
    assert "  --gradient_checkpointing: " in text


def test_where_nothing_helps_that_is_said(checked: Checked) -> None:
    plan = planned(checked, 1, "--fp8_scaled", "--gradient_checkpointing")
    assert plan.cures == {} and smaller_clip(plan) == ""
    assert "a card with more memory" in lines(plan)


def test_a_smaller_batch_or_clip_is_proposed(checked: Checked) -> None:
    plan = planned(checked, 2000)
    clip = replace(
        plan.largest, pixels=PixelShape(480, 480, 81), load=replace(plan.largest.load, tokens=18900, batch=1)
    )
    needs = plan.outlook.peak(replace(clip.load, tokens=900 * 11))
    tight = replace(plan, buckets=(clip,), target=replace(plan.target, room=needs))
    assert smaller_clip(tight).startswith("41 instead of 81 frames")
    pair = replace(clip, batch=4, load=replace(clip.load, tokens=900, batch=4))
    room = plan.outlook.peak(replace(pair.load, batch=3))
    assert smaller_clip(replace(tight, buckets=(pair,), target=replace(plan.target, room=room))).startswith(
        "batch_size = 3"
    )


def test_too_little_system_memory_is_said(checked: Checked) -> None:
    plan = planned(checked, 2000)
    assert "too much system memory" not in lines(plan)
    poor = replace(plan, target=replace(plan.target, host_free=2**30))
    assert "too much system memory: about 3." in lines(poor) and "of 1.0 GiB" in lines(poor)


def test_previews_are_planned(checked: Checked, training_folder: TrainingFolder) -> None:
    models = training_folder.models
    prompts = training_folder.folder / "prompts.txt"
    prompts.write_text("a shape --w 64 --h 64 --f 5")
    flags = ("--sample_prompts", str(prompts), "--sample_at_first", "--offline", "--tokenizer", str(models.tokenizer))
    plan = planned(checked, 2000, *flags, "--vae", str(models.vae), "--t5", str(models.t5))
    resting = sum(plan.outlook.resting().values())
    assert plan.other_peaks["previews"] > resting
    assert plan.other_peaks["text encoder for previews"] > 300 * MIB
    tight = replace(plan, target=replace(plan.target, room=200 * MIB))
    assert "too much for the text encoder for previews" in lines(tight)


def test_caches_that_are_there_are_counted(checked: Checked) -> None:
    plan = planned(checked, 2000)
    assert 0 < plan.disk.text_there == plan.disk.text
    assert plan.disk.latents_there == pytest.approx(plan.disk.latents, abs=9 * 1024)


def test_the_record_holds_what_was_said(checked: Checked) -> None:
    plan = planned(checked, 2000)
    record = plan_record(plan)
    assert record["fits"] is True
    assert [bucket["peak_bytes"] for bucket in record["buckets"]] == [bucket.peak for bucket in plan.buckets]
    assert sum(record["card_bytes"].values()) == plan.largest.peak
    assert record["settings"]["trained_numbers"] == plan.outlook.trained


def test_auto_is_zero_without_a_card_and_that_is_said(checked: Checked, said: Captured) -> None:
    config, prepared = checked("--blocks_to_swap", "auto")
    settled = settled_config(config, prepared, planning.present_target(config))
    assert settled.memory.blocks_to_swap == 0
    assert "--blocks_to_swap auto: 0" in said.text


def settled_config(config: TrainConfig, prepared: Prepared, card: Target) -> TrainConfig:
    return planning.settle(config, prepared, card)[0]


def tight_target(checked: Checked, *flags: str) -> tuple[TrainConfig, Prepared, Target]:
    """Where a few blocks have to be swapped."""
    config, prepared = checked("--blocks_to_swap", "auto", "--gradient_checkpointing", *flags)
    outlook = make_outlook(config, prepared, target(4000), dtype=torch.float32)
    peak = max(bucket.peak for bucket in make_plan(config, prepared, target(4000), dtype=torch.float32).buckets)
    return config, prepared, replace(target(0), room=peak - 2 * outlook.resting()["weights"] // 12)


def test_auto_is_the_fewest_that_fit_on_a_card_whose_rates_are_not_known(checked: Checked, said: Captured) -> None:
    config, prepared, card = tight_target(checked)
    settled = settled_config(config, prepared, replace(card, rates=None))
    assert settled.memory.blocks_to_swap in (2, 3)
    assert f"--blocks_to_swap auto: {settled.memory.blocks_to_swap}; " in said.text
    assert settled_config(config, prepared, target(4000)).memory.blocks_to_swap == 0


def mixed_target(checked: Checked, *flags: str) -> tuple[TrainConfig, Prepared, Target]:
    """Where the small size computes sooner than its blocks are copied."""
    config, prepared, card = tight_target(checked, *flags)
    assert card.rates is not None
    return config, prepared, replace(card, rates=replace(card.rates, link=0.05))


def test_auto_takes_a_number_for_each_size_where_that_is_foretold_to_be_faster_and_that_is_said(
    checked: Checked, said: Captured
) -> None:
    config, prepared, card = mixed_target(checked)
    settled, found = planning.settle(config, prepared, card)
    numbers = found.swapped
    assert len(numbers) == 3 and max(numbers.values()) == settled.memory.num_swapped > min(numbers.values())
    text = ", ".join(str(number) for _, number in sorted((load.tokens * load.batch, n) for load, n in numbers.items()))
    assert said.messages[-1].startswith(f"--blocks_to_swap auto: {text.split(', ')[0]} for ")
    assert "of 12 blocks are swapped, " in said.text and "for every size; " in said.text
    plan = make_plan(settled, found, card, dtype=torch.float32)
    assert plan.fits and plan.faster == {}
    assert {bucket.load: bucket.swapped for bucket in plan.buckets} == numbers
    for bucket in plan.buckets:
        alone = replace(plan.outlook, swapped=bucket.swapped, by_size={})
        assert bucket.peak == alone.peak(bucket.load)
    record = plan_record(plan)
    assert [row["blocks_swapped"] for row in record["buckets"]] == [bucket.swapped for bucket in plan.buckets]
    assert sum(record["card_bytes"].values()) == plan.largest.peak
    header, *rows = [line.split() for line in lines(plan).splitlines() if line.startswith("  ")][:4]
    column = header.index("swapped") - 1  # "needs GiB" is two words
    assert [int(row[column]) for row in rows] == [bucket.swapped for bucket in plan.buckets]
    assert "; swapped: blocks whose memory is freed for that size" in lines(plan)
    alike = replace(settled, memory=replace(settled.memory, blocks_to_swap=11))
    assert "--blocks_to_swap auto" in make_plan(alike, prepared, card, dtype=torch.float32).faster
    assert "swapped" not in "".join(lines(make_plan(alike, prepared, card, dtype=torch.float32)).splitlines()[:2])


def test_of_many_sizes_the_range_is_told() -> None:
    numbers = {Load(tokens=100 * number): number for number in range(9)}
    swapping = Swapping(number=8, fewest=3, by_size=numbers, gain=0.084, alike=5)
    assert planning._reason(swapping, 40) == (
        "0 to 8, each of 9 sizes its own number, of 40 blocks are swapped, 3 would fit; this is foretold to take 8% "
        "less time than 5 for every size"
    )


def test_auto_is_more_than_suffice_where_that_is_foretold_to_be_faster_and_that_is_said(
    checked: Checked, said: Captured
) -> None:
    config, prepared, card = tight_target(checked)
    fewest = settled_config(config, prepared, replace(card, rates=None)).memory.num_swapped
    settled = settled_config(config, prepared, card)
    number = settled.memory.num_swapped
    assert number > fewest
    expected = f"{number} of 12 blocks are swapped: {fewest} would fit, {number} are foretold to take "
    assert f"--blocks_to_swap auto: {expected}" in said.messages[-1] and "% less time; " in said.messages[-1]
    assert make_plan(settled, prepared, card, dtype=torch.float32).faster == {}
    fewer = replace(settled, memory=replace(settled.memory, blocks_to_swap=fewest))
    plan = make_plan(fewer, prepared, card, dtype=torch.float32)
    assert f"--blocks_to_swap {number}" in plan.faster
    spared = plan.faster[f"--blocks_to_swap {number}"]
    assert f"foretold to be faster: --blocks_to_swap {number}, {spared:.0%} less time" in lines(plan)
    assert plan_record(plan)["faster"] == plan.faster
    poor = replace(card, host_free=3 * 2**30)  # as much as the program takes
    assert settled_config(config, prepared, poor).memory.num_swapped == fewest


def test_processes_of_one_machine_share_its_memory(checked: Checked, monkeypatch: pytest.MonkeyPatch) -> None:
    config, prepared = checked()
    assert host_for_blocks(config, prepared, target(4000)) is None
    here = replace(target(4000), host_free=64 * 2**30)
    assert host_for_blocks(config, prepared, here) == 32 * 2**30
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert host_for_blocks(config, prepared, here) == 16 * 2**30
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert host_for_blocks(config, prepared, here) == int(0.8 * 4 * 2**30) - 3 * 2**30
    assert host_for_blocks(config, prepared, replace(here, host_free=2**30)) == 0


def test_auto_swaps_all_where_nothing_suffices(checked: Checked, said: Captured) -> None:
    config, prepared = checked("--blocks_to_swap", "auto")
    assert settled_config(config, prepared, target(1)).memory.blocks_to_swap == 10
    assert "10, which are all" in said.text


def test_a_number_is_left_as_it_is(checked: Checked) -> None:
    config, prepared = checked("--blocks_to_swap", "4")
    assert settled_config(config, prepared, target(1)) is config


def test_the_card_here_is_asked_for_what_is_free(checked: Checked, monkeypatch: pytest.MonkeyPatch) -> None:
    config, _ = checked("--no_compile")
    properties = SimpleNamespace(name="NVIDIA GeForce RTX 3090", total_memory=24 * 2**30)
    monkeypatch.setattr(planning, "find_device", lambda name: torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 * 2**30, 24 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: properties.name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    here = planning.present_target(config)
    assert here.rates is not None and here.rates.name == "RTX 3090" and here.rates.memory == 24
    assert here.room is not None and 18 * 2**30 < here.room < 20 * 2**30
    assert here.total == 24 * 2**30 and here.name == "the NVIDIA GeForce RTX 3090 here" and here.host_free


FAST = ("--mixed_precision", "bf16", "--fp8_scaled", "--fp8_fast")


def on_fast_card(room: int) -> Target:
    return replace(target(0), room=room, fp8="rows")


@pytest.mark.parametrize("checkpointing", [(), ("--gradient_checkpointing",)])
def test_weights_are_transposed_where_every_size_fits_beside_them_with_nothing_recomputed(
    checked: Checked, said: Captured, checkpointing: tuple[str, ...]
) -> None:
    config, prepared = checked(*FAST, *checkpointing)
    plan = make_plan(config, prepared, on_fast_card(2**40), dtype=torch.bfloat16)
    everything = replace(plan.outlook, recompute=False, transposed=True)
    needed = max(everything.peak(bucket.load) for bucket in plan.buckets)
    for room, expected in ((needed, "on"), (needed - 1, "off")):
        said.clear()
        settled = settled_config(config, prepared, on_fast_card(room))
        assert settled.memory.fp8_fast_transposed == expected
        (line,) = said.messages
        wording = "weights are kept" if expected == "on" else "weights are not kept"
        assert line.startswith(f"--fp8_fast_transposed auto: {wording} transposed as well, 0.0 GiB; with nothing")
    settled = settled_config(config, prepared, on_fast_card(needed))
    chosen = make_plan(settled, prepared, on_fast_card(needed), dtype=torch.bfloat16)
    assert chosen.outlook.transposed_bytes > 0 and "+ transposed weights 0.0" in lines(chosen)
    assert chosen.largest.peak - plan.largest.peak == chosen.outlook.transposed_bytes


def test_weights_are_not_transposed_where_blocks_are_swapped(checked: Checked, said: Captured) -> None:
    config, prepared = checked(*FAST, "--blocks_to_swap", "2")
    assert settled_config(config, prepared, on_fast_card(2**40)).memory.fp8_fast_transposed == "off"
    assert said.messages == []
    config, prepared = checked(*FAST, "--blocks_to_swap", "auto", "--fp8_fast_transposed", "on")
    assert settled_config(config, prepared, on_fast_card(2**40)).memory.fp8_fast_transposed == "on"
    settled = settled_config(config, prepared, on_fast_card(1))
    assert settled.memory.fp8_fast_transposed == "off"
    assert said.messages[-1] == "--fp8_fast_transposed on: not done, because 10 blocks are swapped"


@pytest.mark.parametrize("asked", ["on", "off"])
def test_weights_are_transposed_or_not_as_asked(checked: Checked, said: Captured, asked: str) -> None:
    config, prepared = checked(*FAST, "--fp8_fast_transposed", asked)
    room = 1 if asked == "on" else 2**40
    settled = settled_config(config, prepared, on_fast_card(room))
    assert settled.memory.fp8_fast_transposed == asked
    assert len(said.messages) == (asked == "on")
    assert not make_outlook(settled, prepared, target(4000), dtype=torch.bfloat16).transposed  # a card without fp8
    said.clear()
    settled_config(config, prepared, target(4000))
    expected = ["--fp8_fast_transposed on: not done, because nothing is multiplied in fp8"] if asked == "on" else []
    assert said.messages == expected


def test_blocks_of_another_compiler_keep_everything_or_nothing(checked: Checked) -> None:
    ours = planned(checked, 4000, "--gradient_checkpointing", "--compile", "--blocks_to_swap", "2").outlook
    flags = ("--gradient_checkpointing", "--compile", "--compile_backend", "aot_eager", "--blocks_to_swap", "2")
    others = planned(checked, 4000, *flags).outlook
    assert ours.maths.compiled and ours.optional == ours.num_blocks
    assert not others.maths.compiled and others.optional == others.num_blocks - 4


@pytest.mark.parametrize(("seconds", "text"), [(45, "45 s"), (720, "12 min"), (12_600, "3.5 h"), (363_000, "4.2 days")])
def test_times_are_told_in_the_unit_that_fits(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_activations_may_be_given_less_than_is_left(checked: Checked) -> None:
    kept = [
        planned(checked, 2000, "--gradient_checkpointing", *amount).buckets[0].kept
        for amount in ((), ("--activation_memory", "off"), ("--activation_memory", "0.000001"))
    ]
    assert kept == [Kept(12, everything=True), Kept(), Kept()]


def test_limits_of_the_user_hold_for_the_plan_too() -> None:
    free = 24 * 2**30
    assert usable_room(free, MemoryConfig(vram_reserve=4.0)) == int(0.96 * 20 * 2**30)
    assert usable_room(free, MemoryConfig(vram_reserve=4.0, vram_limit=16.0)) == int(0.96 * 16 * 2**30)
    assert usable_room(free, MemoryConfig(vram_reserve=4.0, vram_limit=22.0)) == int(0.96 * 20 * 2**30)
    assert usable_room(free, MemoryConfig(vram_reserve=30.0)) == 0
