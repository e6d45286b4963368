"""Compiled blocks: one graph for all, beside streaming and recomputation."""

import gc
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fresh import run_fresh
from tests.unit.memory.wan import ARGUMENTS, adapted_wan, losses_and_gradients, train_step
from wanlora.foundation.shapes import LatentShape
from wanlora.memory.checkpointing import Kept, Recompute
from wanlora.memory.compile import (
    _children,
    abandon_compiling,
    compile_blocks,
    importing_compiler,
    is_compiled,
    missing_compiler,
    missing_cpp_compiler,
    restore_blocks,
    saving_backend,
)
from wanlora.memory.saving import Save
from wanlora.memory.streaming import BlockStream
from wanlora.models.wan.blocks import WanSelfAttention

CPU = torch.device("cpu")


class _Backend:
    """Counts graphs and runs them as they are."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs += 1
        self.last = graph.graph
        return graph.forward


@pytest.fixture(autouse=True)
def _forget_graphs() -> None:
    torch._dynamo.reset()


def test_one_graph_serves_all_blocks_and_all_lengths() -> None:
    longer = (torch.randn(1, 16, 3, 4, 6), *ARGUMENTS[1:])
    plain = adapted_wan(3)
    expected = [train_step(plain), train_step(plain, longer)]
    model, backend = adapted_wan(3), _Backend()
    compile_blocks(model.blocks, backend=backend, fullgraph=True)
    assert [train_step(model), train_step(model, longer)] == expected
    assert backend.graphs == 1
    assert "item" not in {str(node.target) for node in backend.last.nodes}  # no number but sizes is a variable of it
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        assert ours.grad is None or theirs.grad is None or torch.equal(ours.grad, theirs.grad)


def test_one_graph_serves_texts_of_all_lengths() -> None:
    arguments = [(*ARGUMENTS[:2], [torch.randn(length, 32)]) for length in (5, 40, 200)]
    plain, model, backend = adapted_wan(2, text_len=512), adapted_wan(2, text_len=512), _Backend()
    compile_blocks(model.blocks, backend=backend, fullgraph=True)
    assert [train_step(model, one) for one in arguments] == [train_step(plain, one) for one in arguments]
    assert backend.graphs == 1


def test_sizes_that_happen_to_be_alike_are_not_taken_for_the_same() -> None:
    """The first text has as many rows as the rotary embedding has columns, and the first sample as many tokens."""
    first = torch.randn(1, 16, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    arguments = [(first, ARGUMENTS[1], [torch.randn(50, 32)]), (*ARGUMENTS[:2], [torch.randn(100, 32)])]
    plain, model, backend = adapted_wan(2, text_len=512), adapted_wan(2, text_len=512), _Backend()
    assert (
        plain.rope.get(LatentShape(4, 8, 8), CPU).shape[1:]
        == (64, 64)
        == (64, len(plain.pad_text(arguments[0][2], CPU)[0]))
    )
    compile_blocks(model.blocks, backend=backend, fullgraph=True)
    assert [train_step(model, one) for one in arguments] == [train_step(plain, one) for one in arguments]
    assert backend.graphs == 1


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_compiled_blocks_stream_and_recompute_with_the_same_result(backend: str) -> None:
    expected = losses_and_gradients(adapted_wan(3), steps=2)
    model = adapted_wan(3)
    blocks = list(model.blocks)
    stream = BlockStream(blocks, 3, CPU)
    model.run_block = Recompute(blocks)
    stream.attach()
    compile_blocks(blocks, backend=backend, fullgraph=True)
    result = losses_and_gradients(model, steps=2)
    torch.testing.assert_close(torch.tensor(result), torch.tensor(expected), rtol=1e-4, atol=1e-6)
    assert stream.waits == 2 * 2 * 3 - 3  # at a turn one use follows another


def test_the_graph_of_recomputed_blocks_serves_those_that_are_kept() -> None:
    expected = losses_and_gradients(adapted_wan(3), steps=2)
    model, backend, counts = adapted_wan(3), _Backend(), iter((0, 2, 2))
    runner = Recompute(list(model.blocks))
    runner.keep = lambda x: Kept(count)
    count = next(counts)
    model.run_block = runner
    compile_blocks(model.blocks, backend=backend, fullgraph=True)

    def change() -> None:
        nonlocal count
        count = next(counts)

    assert losses_and_gradients(model, steps=2, between=change) == expected
    assert (runner.recomputed, runner.kept) == (4, 2)
    assert backend.graphs == 1


def test_restoring_takes_the_compiled_forward_off_again() -> None:
    model = adapted_wan(2)
    compile_blocks(model.blocks, backend="eager")
    assert all(map(is_compiled, model.blocks))
    restore_blocks(model.blocks)
    assert not any(map(is_compiled, model.blocks))
    assert losses_and_gradients(model, steps=1) == losses_and_gradients(adapted_wan(2), steps=1)


@pytest.mark.parametrize(("before", "asked", "expected"), [(8, 33, 33), (8, 5, 5), (8, None, 32), (64, None, 64)])
def test_the_cache_limit_is_what_was_asked_for_or_enough_for_all_ways_to_save(
    before: int, asked: int | None, expected: int
) -> None:
    with torch._dynamo.config.patch(recompile_limit=before):
        compile_blocks([], cache_size_limit=asked)
        assert torch._dynamo.config.recompile_limit == expected


def test_blocks_that_are_compiled_in_pieces_say_so_once_and_give_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain, model = adapted_wan(2), adapted_wan(2)
    expected = losses_and_gradients(plain, steps=2)
    forward = WanSelfAttention.forward

    def broken(*args: Any, **kwargs: Any) -> Any:
        torch._dynamo.graph_break("here")
        return forward(*args, **kwargs)

    monkeypatch.setattr(WanSelfAttention, "forward", broken)
    compile_blocks(model.blocks, backend=(backend := _Backend()))
    assert losses_and_gradients(model, steps=2) == expected
    assert backend.graphs > 1
    said = [record.message for record in caplog.records if "in pieces" in record.message]
    assert len(said) == 1 and "graph_break" in said[0]
    torch._dynamo.reset()
    demanding = adapted_wan(2)
    compile_blocks(demanding.blocks, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        train_step(demanding)


def test_one_graph_more_than_may_be_kept_is_said(caplog: pytest.LogCaptureFixture) -> None:
    plain, model = adapted_wan(2), adapted_wan(2)
    longer = (torch.randn(1, 16, 3, 4, 6), *ARGUMENTS[1:])
    expected = [train_step(plain), train_step(plain, longer)]
    with torch._dynamo.config.patch(recompile_limit=1):
        compile_blocks(model.blocks, backend="eager", dynamic=False, cache_size_limit=1)
        assert [train_step(model), train_step(model, longer)] == expected
    assert [record.message for record in caplog.records if "in pieces" in record.message]


def test_a_machine_without_a_c_compiler_is_told_from_one_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/cc")
    monkeypatch.setattr("pathlib.Path.is_file", lambda path: True)
    assert missing_compiler(CPU) is None
    monkeypatch.setattr("pathlib.Path.is_file", lambda path: False)
    assert "headers" in (missing_compiler(CPU) or "")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert missing_compiler(CPU) == "there is no C compiler"


def test_a_card_needs_triton_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "triton" in (missing_compiler(torch.device("cuda")) or "")


class _SmallBlock(nn.Module):
    """Products, attention, and something between them."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(16, 4, bias=False), nn.Linear(4, 16, bias=False)

    def forward(self, x_BLD: Tensor) -> Tensor:
        q_BNLK = self.up(self.down(x_BLD)).sin().unflatten(-1, (2, 8)).transpose(1, 2)
        return x_BLD + F.scaled_dot_product_attention(q_BNLK, q_BNLK, q_BNLK).transpose(1, 2).flatten(2)


def test_cpp_that_queues_kernels_gives_the_same_numbers_for_both_ways_to_save(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward of both ways are C++, and each is cut as it says."""
    from torch._inductor.graph import GraphLowering

    written: list[str] = []
    monkeypatch.setattr(GraphLowering, "save_output_code", written.append)
    plain, block = _SmallBlock(), _SmallBlock()
    block.load_state_dict(plain.state_dict())
    compile_blocks([block], fullgraph=True, cpp_wrapper=True)
    saved: dict[Save, list[torch.Size]] = {"products": [], "attention": []}
    for save, shapes in saved.items():

        def keep(tensor: Tensor, shapes: list[torch.Size] = shapes) -> Tensor:
            shapes.append(tensor.shape)
            return tensor

        for length in (5, 9):
            x_BLD = torch.randn(1, length, 16)
            expected = _output_and_gradients(plain, plain(x_BLD))
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                output = block(x_BLD, save=save)
            torch.testing.assert_close(_output_and_gradients(block, output), expected)
    products = {torch.Size((length, width)) for length in (5, 9) for width in (4, 16)}
    assert products < set(saved["products"]) and set(saved["products"]) - products == set(saved["attention"])
    assert 2 * 2 == len(written) == sum("inductor_entry_impl" in code for code in written)


def _output_and_gradients(block: nn.Module, output: Tensor) -> list[Tensor]:
    return [output.detach(), *torch.autograd.grad(output.square().mean(), [*block.parameters()])]


@pytest.mark.parametrize("mode", ["default", "tuned"])
def test_cpp_is_an_option_of_the_compiler_that_holds_for_backward_too(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Backward is compiled when what `compile_fx` sets for forward is over; kernels that C++ loads must be kept."""
    handed: list[dict[str, Any]] = []

    def compile_fx(graph: object, inputs: object, config_patches: dict[str, Any]) -> None:
        handed.append(config_patches)

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    graph = torch.fx.GraphModule(nn.Module(), torch.fx.Graph())
    saving_backend("products", mode)(graph, [])
    saving_backend("products", mode, cpp_wrapper=True)(graph, [])
    python, cpp = handed
    assert "cpp_wrapper" not in python and cpp["cpp_wrapper"] and cpp["triton.store_cubin"]
    assert python.keys() < cpp.keys()
    with torch._inductor.config.patch(cpp):
        assert torch._inductor.config.triton.store_cubin


def test_a_machine_that_cannot_compile_cpp_is_told_from_one_that_can(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    card, there = torch.device("cuda"), "/usr/bin/other"
    monkeypatch.setattr(shutil, "which", lambda name: there if name == "other" else None)
    monkeypatch.setenv("CXX", "g++-0")
    assert missing_cpp_compiler(CPU) == "there is no C++ compiler (g++-0)"
    monkeypatch.setenv("CXX", "other")
    assert missing_cpp_compiler(CPU) is None
    monkeypatch.setattr("torch.utils.cpp_extension.include_paths", lambda device: [str(tmp_path)])
    monkeypatch.setattr("wanlora.memory.compile._CUDA_HEADER", "of_cuda.h")
    assert "CUDA's headers" in (missing_cpp_compiler(card) or "")
    (tmp_path / "of_cuda.h").touch()
    assert missing_cpp_compiler(card) is None

    def nowhere(device: str) -> list[str]:
        raise OSError("CUDA_HOME is not set")

    monkeypatch.setattr("torch.utils.cpp_extension.include_paths", nowhere)
    assert "CUDA's headers" in (missing_cpp_compiler(card) or "")


def test_the_compiler_is_imported_by_another_thread_and_is_there_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = []
    began = threading.Event()

    def import_module(name: str) -> None:
        assert began.wait(10)
        imported.append((name, threading.current_thread(), gc.isenabled()))
        raise ImportError("shown where it is used")

    monkeypatch.setattr("wanlora.memory.compile.importlib.import_module", import_module)
    with importing_compiler(whole=True):
        assert not imported
        began.set()
    ((name, thread, collects),) = imported
    assert name == "torch._inductor.compile_fx" and thread is not threading.main_thread()
    assert not collects
    with importing_compiler(whole=False):
        pass
    assert gc.isenabled()
    assert [name for name, *_ in imported] == ["torch._inductor.compile_fx", "torch._dynamo"]


@pytest.mark.parametrize("recomputes", [False, True])
def test_training_does_without_the_compiler_where_it_says_so(recomputes: bool) -> None:
    """In a process of its own: here somebody may have loaded it long ago."""
    code = (
        "import sys, torch\n"
        "from wanlora.memory.compile import does_without_compiler\n"
        "recomputes = sys.argv[1] == 'True'\n"
        "expected = does_without_compiler(recomputes=recomputes)\n"
        "assert expected or recomputes\n"
        "layer = torch.nn.Linear(4, 4)\n"
        "optimizer = torch.optim.AdamW(layer.parameters())\n"
        "x = torch.ones(2, 4, requires_grad=True)\n"
        "checkpoint = torch.utils.checkpoint.checkpoint\n"
        "out = checkpoint(layer, x, use_reentrant=False) if recomputes else layer(x)\n"
        "out.sum().backward()\n"
        "assert torch.equal(layer.bias.grad, torch.full((4,), 2.0)) and x.grad is not None\n"
        "optimizer.zero_grad()\n"
        "optimizer.load_state_dict(optimizer.state_dict())\n"
        "optimizer.add_param_group({'params': [torch.nn.Parameter(x.detach())]})\n"
        "assert expected == (not {'torch._dynamo', 'sympy'} & set(sys.modules))\n"
    )
    run_fresh(code, str(recomputes))


def test_ctrl_c_does_not_wait_for_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    importing: list[threading.Thread] = []
    began, go_on = threading.Event(), threading.Event()

    def import_module(name: str) -> None:
        importing.append(threading.current_thread())
        began.set()
        go_on.wait(10)

    monkeypatch.setattr("wanlora.memory.compile.importlib.import_module", import_module)
    with pytest.raises(KeyboardInterrupt), importing_compiler(whole=True):
        assert began.wait(10)
        raise KeyboardInterrupt
    (thread,) = importing
    assert thread.is_alive() and thread.daemon
    go_on.set()
    thread.join()
    assert gc.isenabled()


def test_processes_that_compile_are_ended_and_torch_does_not_wait_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = "import subprocess, sys; print('at work', flush=True); subprocess.run([sys.executable, '-c', 'input()'])"
    process = subprocess.Popen([sys.executable, "-c", worker], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline() == "at work\n"
    while sys.platform == "linux" and not _children(process.pid):
        time.sleep(0.01)
    pools = [SimpleNamespace(running=True, process=process), SimpleNamespace()]
    monkeypatch.setitem(sys.modules, "torch._inductor.async_compile", SimpleNamespace(_pool_set=pools))
    abandon_compiling()
    assert process.wait(10) != 0 and not pools[0].running
    if sys.platform == "linux":
        assert process.stdout.read() == ""  # which the worker would hold open until its input ends
    process.stdin.close()


def test_without_a_compiler_there_is_nothing_to_abandon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch._inductor.async_compile", raising=False)
    abandon_compiling()
