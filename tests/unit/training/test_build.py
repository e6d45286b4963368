"""What is built from the settings, read back from the built parts."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from tests.runs import TrainingFolder
from tests.unit.training.conftest import Checked
from tests.unit.training.parts import CPU
from wanlora.config.train import MemoryConfig
from wanlora.foundation.log import log
from wanlora.foundation.random import Streams
from wanlora.lora.drawing import draw_down, drawing_downs
from wanlora.lora.files import save_lora
from wanlora.memory.checkpointing import Kept, Recompute
from wanlora.memory.compile import is_compiled
from wanlora.memory.limit import CardLimit
from wanlora.memory.measure import GIB, CudaMeter
from wanlora.memory.streaming import BlockStream
from wanlora.models.wan.transformer import WanTransformer
from wanlora.quantization.fast_linear import FastFp8Linear, fast_layers
from wanlora.quantization.linear import Fp8Linear
from wanlora.training.build import (
    Trainee,
    _load,
    build_trainee,
    choose_keeping,
    keep_transposed,
    num_streamed,
    residual_dtype,
    wants_compile,
    wants_cpp_wrapper,
)
from wanlora.training.plan import Target, make_outlook


def build(checked: Checked, *flags: str) -> Trainee:
    config, prepared = checked(*flags)
    return build_trainee(config, prepared, CPU, Streams(7), quiet=True)


def num_kept(built: Trainee) -> int:
    """Blocks that keep what they computed in the first pass of some size."""
    with built.keeping.step(), built.keeping.batch("a size"):
        return built.recompute.keep(torch.empty(1, 8, 128)).blocks


def test_a_plain_run(checked: Checked) -> None:
    built = build(checked, "--network_dim", "6", "--network_alpha", "3")
    assert built.dtype is torch.float32
    assert built.stream is None
    assert num_kept(built) == len(built.model.blocks)
    assert not any(is_compiled(block) for block in built.model.blocks)
    assert built.model.attention == "sdpa"
    adapter = built.network.adapters["blocks.0.self_attn.q"]
    assert (adapter.rank, adapter.scale) == (6, 0.5)
    trained = {id(parameter) for parameter in built.model.parameters() if parameter.requires_grad}
    assert trained == {id(parameter) for parameter in built.network.parameters()}
    assert all(parameter.dtype is torch.float32 for parameter in built.network.parameters())
    assert built.model.training


def test_every_kind_of_dropout_reaches_the_adapters(checked: Checked) -> None:
    arguments = ("--network_dropout", "0.1", "--network_args", "rank_dropout=0.2", "module_dropout=0.3")
    for adapter in build(checked, *arguments).network.adapters.values():
        assert (adapter.dropout, adapter.rank_dropout, adapter.module_dropout) == (0.1, 0.2, 0.3)


def test_initial_weights_are_a_function_of_the_seed(checked: Checked) -> None:
    one, other = (build(checked).network.state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("flags", "kind"), [(["--fp8_base"], "plain"), (["--fp8_base", "--fp8_scaled"], "scaled")])
def test_fp8_weights_lie_under_the_adapters(checked: Checked, flags: list[str], kind: str) -> None:
    built = build(checked, *flags, "--mixed_precision", "bf16")
    base = built.network.adapters["blocks.3.ffn.0"].base
    assert isinstance(base, Fp8Linear)
    assert base.weight.dtype is torch.float8_e4m3fn
    assert (built.dtype, built.model.compute_dtype) == (torch.bfloat16, torch.bfloat16)


def test_fp8_maths_reach_every_matrix_of_the_blocks(checked: Checked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wanlora.training.build.missing_fp8_maths", lambda device: None)
    built = build(checked, "--fp8_scaled", "--fp8_fast", "--mixed_precision", "bf16")
    layers = fast_layers(built.model)
    assert set(layers) == {f"{name}.base" for name in built.network.adapters}
    assert all(layer.scale.shape == (layer.out_features, 1, 1) for layer in layers.values())


def test_weights_are_transposed_as_decided_in_layers_that_multiply_in_fp8_and_as_planned(
    checked: Checked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wanlora.training.build.missing_fp8_maths", lambda device: None)
    flags = ("--fp8_scaled", "--fp8_fast", "--mixed_precision", "bf16", "--fp8_fast_transposed", "on")
    built = build(checked, *flags)
    config, prepared = checked(*flags)
    layers = fast_layers(built.model)
    assert not keep_transposed(MemoryConfig(fp8_fast_transposed="auto"), built.model).are_kept
    kept = keep_transposed(config.memory, built.model)
    assert all(layer.across is not None for layer in layers.values())
    here = Target(name="here", fp8="rows", streams=False)
    outlook = make_outlook(config, prepared, here, dtype=torch.bfloat16)
    assert kept.num_bytes == outlook.resting()["transposed weights"]
    kept.drop()
    widened = built.network.adapters["blocks.0.ffn.0"].base
    assert isinstance(widened, FastFp8Linear)
    widened.kernel = None
    keep_transposed(config.memory, built.model)
    assert [name for name, layer in layers.items() if layer.across is None] == ["blocks.0.ffn.0.base"]


def test_transposed_weights_that_do_not_fit_after_all_are_done_without(
    checked: Checked, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def too_much(layer: FastFp8Linear) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(log, "propagate", True)
    monkeypatch.setattr("wanlora.training.build.missing_fp8_maths", lambda device: None)
    monkeypatch.setattr(FastFp8Linear, "transpose", too_much)
    built = build(checked, "--fp8_scaled", "--fp8_fast", "--mixed_precision", "bf16")
    assert not keep_transposed(MemoryConfig(fp8_fast_transposed="on"), built.model).are_kept
    assert "too little memory left for transposed weights" in caplog.messages[-1]


def test_a_machine_that_cannot_multiply_in_fp8_is_told_so(
    checked: Checked, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(log, "propagate", True)
    monkeypatch.setattr("wanlora.foundation.log._said", set())
    built = build(checked, "--fp8_scaled", "--fp8_fast", "--mixed_precision", "bf16")
    assert not fast_layers(built.model)
    base = built.network.adapters["blocks.0.ffn.0"].base
    assert isinstance(base, Fp8Linear) and base.scale.shape[1] == base.in_features // 64
    warnings = {record.getMessage() for record in caplog.records if record.levelno == logging.WARNING}
    assert warnings == {
        "--fp8_fast: there is no CUDA card; weights are kept in fp8 and multiplied in the model's own number format"
    }


def test_compiling_is_done_when_asked_for(checked: Checked) -> None:
    built = build(checked, "--compile", "--compile_backend", "eager")
    assert all(is_compiled(block) for block in built.model.blocks)


def test_compiling_is_the_default_only_on_cuda_with_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    monkeypatch.setattr("wanlora.training.build.missing_compiler", lambda device: None)
    assert wants_compile(MemoryConfig(), cuda)
    assert not wants_compile(MemoryConfig(), CPU)
    assert wants_compile(MemoryConfig(compile=True), CPU)
    assert not wants_compile(MemoryConfig(compile=False), cuda)
    monkeypatch.setattr("wanlora.training.build.missing_compiler", lambda device: "there is no C compiler")
    assert not wants_compile(MemoryConfig(compile=True), cuda)
    assert wants_compile(MemoryConfig(compile=True, compile_backend="eager"), CPU)


@pytest.mark.parametrize(
    ("options", "missing", "wanted", "message"),
    [
        ({}, None, False, None),
        ({"compile_cpp_wrapper": True}, None, True, None),
        ({"compile_cpp_wrapper": True, "compile_backend": "eager"}, "no compiler", False, None),
        ({"compile_cpp_wrapper": True}, "no compiler", False, "no compiler; kernels are queued by Python"),
    ],
)
def test_kernels_are_queued_by_cpp_where_that_is_asked_for_and_can_be_compiled(
    options: dict[str, Any],
    missing: str | None,
    wanted: bool,
    message: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level(logging.INFO, logger="wanlora")
    monkeypatch.setattr("wanlora.foundation.log._said", set())
    monkeypatch.setattr("wanlora.training.build.missing_cpp_compiler", lambda device: missing)
    assert wants_cpp_wrapper(MemoryConfig(**options), CPU) == wanted
    assert len(set(caplog.messages)) == (message is not None)
    assert message is None or message in caplog.text


@pytest.mark.parametrize("flags", [[], ["--compile_cpp_wrapper"]])
def test_the_compiled_blocks_are_told_who_queues_their_kernels(
    checked: Checked, monkeypatch: pytest.MonkeyPatch, flags: list[str]
) -> None:
    monkeypatch.setattr("wanlora.training.build.missing_cpp_compiler", lambda device: None)
    forward: Any = build(checked, "--compile", *flags).model.blocks[0].forward
    assert forward.__func__.cpp_wrapper == bool(flags)


def test_queueing_by_cpp_without_compiling_on_a_cpu_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level(logging.INFO, logger="wanlora")
    monkeypatch.setattr("wanlora.foundation.log._said", set())
    assert not wants_compile(MemoryConfig(compile_cpp_wrapper=True), CPU)
    assert set(caplog.messages) == {
        "--compile_cpp_wrapper changes nothing: on a CPU blocks are compiled only with --compile"
    }


@pytest.mark.parametrize(
    ("flags", "whole"),
    [(["--compile"], True), (["--compile", "--compile_backend", "aot_eager"], False)],
)
def test_the_compiler_is_imported_while_the_model_is_read_the_whole_if_blocks_are_compiled_by_it(
    checked: Checked, monkeypatch: pytest.MonkeyPatch, flags: list[str], whole: bool
) -> None:
    events: list[object] = []

    @contextmanager
    def importing_compiler(*, whole: bool) -> Iterator[None]:
        events.append(whole)
        yield
        events.append("imported")

    def load(*args: Any) -> WanTransformer:
        events.append("read")
        return _load(*args)

    monkeypatch.setattr("wanlora.training.build.importing_compiler", importing_compiler)
    monkeypatch.setattr("wanlora.training.build._load", load)
    build(checked, *flags)
    assert events == [whole, "read", "imported"]
    events.clear()
    build(checked, "--no_compile", "--optimizer_type", "adamw8bit")
    assert events == ["read"]
    monkeypatch.setattr("wanlora.training.build.does_without_compiler", lambda *, recomputes: not recomputes)
    for other in (["--optimizer_type", "adamw"], ["--optimizer_type", "adamw8bit", "--gradient_checkpointing"]):
        events.clear()
        build(checked, "--no_compile", *other)
        assert events == [False, "read", "imported"]


def test_tensorboard_is_imported_while_the_model_is_read_unless_the_compiler_is(
    checked: Checked, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    events: list[str] = []

    @contextmanager
    def importing(module: str, **options: Any) -> Iterator[None]:
        events.append(module)
        yield
        events.append("imported")

    def load(*args: Any) -> WanTransformer:
        events.append("read")
        return _load(*args)

    monkeypatch.setattr("wanlora.training.build.importing", importing)
    monkeypatch.setattr("wanlora.training.build.importing_compiler", partial(importing, "compiler"))
    monkeypatch.setattr("wanlora.training.build._load", load)
    plain = ("--no_compile", "--optimizer_type", "adamw8bit")
    config, prepared = checked(*plain, "--logging_dir", str(tmp_path))
    build_trainee(config, prepared, CPU, Streams(7), quiet=False)
    assert events == ["torch.utils.tensorboard", "read", "imported"]
    events.clear()
    build_trainee(config, prepared, CPU, Streams(7), quiet=True)  # its main process logs
    build(checked, *plain)
    assert events == ["read", "read"]
    events.clear()
    config, prepared = checked("--compile", "--compile_backend", "aot_eager", "--logging_dir", str(tmp_path))
    build_trainee(config, prepared, CPU, Streams(7), quiet=False)
    assert events == ["compiler", "read", "imported"]


def test_the_first_factors_are_drawn_once_while_the_model_is_read(
    checked: Checked, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[threading.Thread] = []

    def counted(*arguments: Any) -> torch.Tensor:
        drawn.append(threading.current_thread())
        return draw_down(*arguments)

    def load(*args: Any) -> WanTransformer:
        for thread in {*drawn, *threading.enumerate()} - before:
            thread.join()
        in_time.append(len(drawn))
        return _load(*args)

    in_time: list[int] = []
    before = set(threading.enumerate())
    monkeypatch.setattr("wanlora.lora.drawing.draw_down", counted)
    monkeypatch.setattr("wanlora.lora.layers.draw_down", counted)
    monkeypatch.setattr("wanlora.training.build._load", load)
    built = build(checked, "--network_dim", "3")
    assert in_time == [len(built.network)] == [len(drawn)] and set(drawn).isdisjoint(before)
    downs = drawing_downs({"blocks.0.self_attn.q": (3, 128)}, Streams(7).generator("init")).result()
    first = next(iter(built.network.adapters))
    assert torch.equal(built.network.adapters[first].lora_down.weight, downs["blocks.0.self_attn.q"])


def test_recomputation_covers_all_blocks_with_gradient_checkpointing(checked: Checked) -> None:
    built = build(checked, "--gradient_checkpointing", "--gradient_checkpointing_cpu_offload")
    assert built.model.run_block is built.recompute
    assert built.recompute.indexes == tuple(range(len(built.model.blocks)))
    assert num_kept(built) == 0
    assert built.recompute.offload


CARD = CardLimit(total=24 * GIB, others=GIB, reserve=GIB, at_most=20 * GIB)


@pytest.mark.parametrize(("amount", "expected"), [("auto", None), ("off", 0), (1.5, 1.5 * GIB)])
def test_activations_get_what_the_flag_says_below_what_the_card_may_hold(
    amount: float | Literal["auto", "off"], expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    blocks = [torch.nn.Linear(1, 1) for _ in range(6)]
    runner = Recompute(blocks, stream=BlockStream(blocks, 2, CPU))
    config = MemoryConfig(gradient_checkpointing=True, activation_memory=amount)
    made = choose_keeping(config, runner, torch.device("cuda"), CARD, attention=7)
    assert (made.limit, made.activations) == (CARD.allocated, expected)
    assert (made.num_optional, made.num_blocks, made.num_inputs) == (4, 6, 6)
    assert isinstance(made.meter, CudaMeter)
    assert made(torch.empty(1, 8, 128)) == Kept()


def test_what_is_left_of_the_memory_is_used_unless_something_else_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    config = MemoryConfig(gradient_checkpointing=True)
    made = choose_keeping(config, Recompute([torch.nn.Linear(1, 1)]), torch.device("cuda"), CARD, attention=7)
    assert made.activations is None and config.trial_step is None


def test_a_share_of_the_card_means_nothing_on_a_cpu_and_that_is_said(
    checked: Checked, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level(logging.INFO, logger="wanlora")
    assert build(checked, "--gradient_checkpointing", "--activation_memory", "2.25").keeping.meter is None
    assert "--activation_memory 2.25 has no effect on a CPU" in caplog.text


def test_blocks_are_swapped_only_where_there_is_a_card() -> None:
    cuda = torch.device("cuda")
    assert num_streamed(MemoryConfig(blocks_to_swap=10), CPU, 40) == 0
    assert num_streamed(MemoryConfig(blocks_to_swap=10, block_swap_ring_size=3), cuda, 40) == 13
    assert num_streamed(MemoryConfig(blocks_to_swap=39), cuda, 40) == 40
    assert num_streamed(MemoryConfig(), cuda, 40) == 0


def test_the_residual_stream_is_float32_unless_asked_otherwise(checked: Checked) -> None:
    assert residual_dtype(MemoryConfig()) is torch.float32
    assert build(checked, "--residual_dtype", "bfloat16").model.residual_dtype is torch.bfloat16


def test_chosen_modules_are_trained_and_listed(
    checked: Checked, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level(logging.INFO, logger="wanlora")
    built = build(checked, "--network_args", "include_patterns=['blocks.[01].ffn.*']", "verbose=True")
    chosen = {f"blocks.{block}.ffn.{layer}" for block in (0, 1) for layer in (0, 2)}
    assert set(built.network.adapters) == chosen
    listed = {record.getMessage().split(":")[0].strip() for record in caplog.records}
    assert chosen <= listed


def test_a_run_goes_on_from_a_lora_file_and_its_ranks(checked: Checked, training_folder: TrainingFolder) -> None:
    first = build(checked, "--network_dim", "2", "--network_alpha", "1").network
    for adapter in first.adapters.values():
        torch.nn.init.normal_(adapter.lora_up.weight)
    path = training_folder.folder / "first.safetensors"
    save_lora(path, first)
    second = build(checked, "--network_weights", str(path), "--dim_from_weights").network
    assert {adapter.rank for adapter in second.adapters.values()} == {2}
    assert all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in first.state_dict().items())


def test_merged_loras_change_the_base_and_not_the_adapters(checked: Checked, training_folder: TrainingFolder) -> None:
    first = build(checked)
    for adapter in first.network.adapters.values():
        torch.nn.init.normal_(adapter.lora_up.weight, std=0.01)
    path = training_folder.folder / "first.safetensors"
    save_lora(path, first.network)
    merged = build(checked, "--base_weights", str(path), "--base_weights_multiplier", "0.5")
    adapter, after = (built.network.adapters["blocks.2.ffn.2"] for built in (first, merged))
    update = adapter.scale * adapter.lora_up.weight @ adapter.lora_down.weight
    base, changed = (part.base.get_parameter("weight") for part in (adapter, after))
    torch.testing.assert_close(changed, base + 0.5 * update)
    assert not after.lora_up.weight.any()
