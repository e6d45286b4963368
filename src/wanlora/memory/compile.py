"""Compiled blocks: one graph for all of them.

Every block runs the same code on weights of the same shapes, so its forward is compiled once, as a function of the
block, and each block calls that function. Weights enter the graph as inputs: which memory they lie in may change from
call to call, as it does for streamed blocks. Only `forward` is compiled, not the call around it: hooks before a block
(streaming) and what wraps the call (recomputation) stay ordinary Python outside of the graph. The number of tokens is
a variable of the graph unless `dynamic` says otherwise. With torch's own compiler each call may say what is saved for
its backward (`saving.py`); there is one graph for each such way.
"""

import importlib.util
import os
import shutil
import signal
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import MethodType, ModuleType
from typing import Any

import torch
import torch.utils.checkpoint as checkpointing
from torch import Tensor, nn
from torch.optim import Optimizer

from wanlora.foundation.log import log
from wanlora.foundation.meanwhile import importing
from wanlora.memory.saving import Save

TUNED = "tuned"
"""A mode of ours: the compiler tries more shapes of each kernel of its own, of products none."""
TUNING = (TUNED, "max-autotune", "max-autotune-no-cudagraphs")
"""Modes that take the fastest of several kernels, which may add up in another order."""
OWN_GRAPHS = ("max-autotune", "reduce-overhead")
"""Modes in which torch replays CUDA graphs of single blocks."""
_TRACER, _COMPILER = "torch._dynamo", "torch._inductor.compile_fx"
_OPTIMIZERS_OWN = (Optimizer.add_param_group, Optimizer.zero_grad, Optimizer.state_dict, Optimizer.load_state_dict)
_RECOMPUTING = ("checkpoint", "_run_fn_with_dynamo_disabled")
_C_COMPILERS = ("cc", "gcc", "clang", "cl")
_CPP_COMPILERS = {"win32": "cl", "darwin": "clang++"}
"""What torch calls, unless the environment names another in CXX; elsewhere g++."""
_CUDA_HEADER = "cuda_runtime_api.h"
_TRITON_CAPABILITY = (7, 0)
_KEEPS_OWN_BACKWARDS = "autograd_cache_allow_custom_autograd_functions"
_KEEPS_FUNCTIONS = "unsafe_marked_cacheable_functions"
_CHOOSING_ATTENTION = ("torch.nn.attention._backend_from_string", "torch.nn.attention._sdpa_kernel")
"""What torch traces where a backend of attention is chosen."""
_GRAPHS = 32
"""So many graphs of the blocks are kept unless the user says otherwise."""
_READS = 5
"""A result that is used again is computed again if that takes so many reads at most; torch's own number is 4.

A gradient that comes back through the rotary embedding and a norm's weight takes five: both elements of a pair, cosine,
sine, weight. Stored between the two passes over its row it would be a write of 4 bytes for each element of queries and
keys, and their reads come from the cache.
"""


@contextmanager
def importing_compiler(*, whole: bool) -> Iterator[None]:
    """Import the compiler in a thread while the caller waits for something else (a checkpoint); it is there afterwards.

    It takes seconds, which `torch.compile` would otherwise take when blocks are made ready. An error shows there too.
    Without `whole` only the part that traces.
    """
    with importing(_COMPILER if whole else _TRACER):
        yield


def does_without_compiler(*, recomputes: bool) -> bool:
    """Whether torch trains without importing its compiler, once nothing is to be compiled; asked before it does.

    It would import it when an optimizer or recomputing is first used, only to tell it what is none of its business, and
    note the answer on the function; here the answer is given. The import takes several seconds, most of a start from
    kept weights. Versions of torch that look into the compiler's settings to recompute (2.13 does) cannot do without.
    """
    for function in (*_OPTIMIZERS_OWN, *(getattr(checkpointing, name, None) for name in _RECOMPUTING)):
        original = getattr(function, "__wrapped__", None)
        if original is not None:
            vars(original).setdefault("__dynamo_disable", original)
    asking: Any = getattr(checkpointing, "_checkpoint_without_reentrant_generator", None)
    return not recomputes or (asking is not None and "_dynamo" not in asking.__code__.co_names)


def abandon_compiling() -> None:
    """Stop the processes that compile kernels, before this one ends early. Nothing can be compiled afterwards.

    When it ends, torch before 2.13 waits for every kernel that was asked for: of a first step those of whole graphs,
    tens of seconds.
    """
    for pool in getattr(sys.modules.get("torch._inductor.async_compile"), "_pool_set", ()):
        process = getattr(pool, "process", None)
        if process is not None:
            workers = _children(process.pid)
            pool.running = False  # or torch would tell the process to end, and wait
            process.kill()
            for worker in workers:  # they would live on for a minute
                with suppress(ProcessLookupError):
                    os.kill(worker, signal.SIGKILL)


def _children(process: int) -> list[int]:
    """The processes that a process has started, on Linux; elsewhere torch compiles for cards without any."""
    children = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it is over by now
            parent = status.read_text().rpartition(")")[2].split()[1]
            children += [int(status.parent.name)] if int(parent) == process else []
    return children


def compile_blocks(
    blocks: Iterable[nn.Module],
    *,
    backend: str | Callable[..., Any] = "inductor",
    mode: str | None = None,
    dynamic: bool | None = True,
    fullgraph: bool = False,
    cache_size_limit: int | None = None,
    cpp_wrapper: bool = False,
) -> None:
    """Compile the forward of each block in place; the work happens at the first call.

    The options are those of `torch.compile`; `cache_size_limit` is how many variants of a graph are kept. With
    `cpp_wrapper` kernels are queued by C++ instead of Python, if the backend is torch's own compiler.
    """
    # A norm's epsilon is a number like others to the compiler, until it has traced a block and begins again without.
    torch._dynamo.config.specialize_float = True
    # Sizes that happen to be alike are not the same: a text of as many rows as the rotary embedding is wide would get a
    # graph of its own, and one of another length the next.
    torch.fx.experimental._config.use_duck_shape = False
    limit = torch._dynamo.config.recompile_limit
    # Graphs of all ways to save count together; one too many, and blocks would go on as plain Python.
    torch._dynamo.config.recompile_limit = cache_size_limit or max(limit, _GRAPHS)
    compiled: dict[type[nn.Module], CompiledForward] = {}
    for block in blocks:
        if is_compiled(block):
            continue
        kind = type(block)
        if kind not in compiled:
            compile_with = partial(torch.compile, kind.forward, dynamic=dynamic)
            compiled[kind] = CompiledForward(
                compile_with, backend=backend, mode=mode, one_graph=fullgraph, cpp_wrapper=cpp_wrapper
            )
        block.forward = MethodType(compiled[kind], block)


class CompiledForward:
    """The forward of all blocks of a class, in a graph for each way to save that is asked for.

    While training, every block's input needs a gradient: the first block's does not, and a graph of its own for that
    would take as long to compile as that for all others; the gradient that is computed for nothing is one part in
    several hundred of a step.

    Where the compiler cannot make one graph of a block, or may not make another, it makes pieces with Python in
    between, which is said; with `one_graph` its error is raised instead.
    """

    def __init__(
        self,
        compile_with: Callable[..., Any],
        *,
        backend: str | Callable[..., Any],
        mode: str | None,
        one_graph: bool = False,
        cpp_wrapper: bool = False,
    ) -> None:
        self.compile_with = compile_with
        self.backend = backend
        self.mode = mode
        self.one_graph = one_graph
        self.cpp_wrapper = cpp_wrapper
        self.in_pieces = False
        self._graphs: dict[Save, Callable[..., Any]] = {}

    @property
    def chooses(self) -> bool:
        """Whether the compiler takes wishes about what is saved."""
        return self.backend == "inductor"

    def __call__(self, block: nn.Module, x: Tensor, *args: Tensor, save: Save = "products") -> Any:
        if torch.is_grad_enabled() and not x.requires_grad:
            x = x.detach().requires_grad_()
        try:
            return self._graph(save)(block, x, *args)
        except Exception as error:
            if self.one_graph or not _is_about_graphs(error):
                raise
            self._go_on_in_pieces(save, error)
        return self._graph(save)(block, x, *args)

    def _graph(self, save: Save) -> Callable[..., Any]:
        if save not in self._graphs:
            compile_with = partial(self.compile_with, fullgraph=not self.in_pieces)
            self._graphs[save] = (
                compile_with(backend=saving_backend(save, self.mode, cpp_wrapper=self.cpp_wrapper))
                if self.chooses
                else compile_with(backend=self.backend, mode=self.mode)
            )
        return self._graphs[save]

    def _go_on_in_pieces(self, save: Save, error: Exception) -> None:
        """Nothing has been computed yet: the compiler raises while it looks at the code."""
        if not self.in_pieces:
            reason = str(error).strip().splitlines()[0]
            log.warning(
                f"blocks are not all compiled as one graph each: {reason}. They go on in pieces, beyond the limit of "
                "graphs (--compile_cache_size_limit) as plain Python, which takes more time and memory"
            )
        self.in_pieces = True
        del self._graphs[save]


def _is_about_graphs(error: Exception) -> bool:
    """Whether the compiler found something that it cannot trace, or made as many graphs as it may."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, Unsupported

    return isinstance(error, Unsupported | FailOnRecompileLimitHit)


def mode_options(mode: str | None) -> dict[str, Any]:
    """Settings of torch's own compiler for a mode of `torch.compile` or `TUNED`."""
    from torch._inductor import list_mode_options

    if mode == TUNED:
        return {"coordinate_descent_tuning": True}
    return list_mode_options(mode) if mode else {}


def cpp_wrapper_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """What torch's own compiler must be told, beside `options`, to write the code that queues kernels in C++.

    It settles the rest itself only while forward is compiled. Backward of a graph with variable sizes is compiled when
    it is first needed, and torch 2.11 would then look for kernels that were not kept.
    """
    from torch._inductor import config
    from torch._inductor.compile_fx import get_cpp_wrapper_config

    with config.patch(dict(options)):
        return {"cpp_wrapper": True, **get_cpp_wrapper_config()}


def saving_backend(save: Save, mode: str | None, *, cpp_wrapper: bool = False) -> Callable[..., Any]:
    """A backend for `torch.compile` that cuts graphs as `save` says; `mode`: see `mode_options`.

    Torch keeps kernels and cut graphs for later starts, which takes most of compiling off them. It would not keep
    graphs of functions with a backward of their own, as fp8 weights have, nor such that choose a backend of attention,
    but it knows both by all they say: the code of either pass, the backends by name.
    """

    def compile_graph(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        import torch._functorch.config as partitioning
        from torch._inductor import config
        from torch._inductor.compile_fx import compile_fx

        from wanlora.memory.marking import Marking

        options = {"realize_reads_threshold": _READS, **mode_options(mode), "joint_custom_post_pass": Marking(save)}
        options |= cpp_wrapper_options(options) if cpp_wrapper else {}
        options |= _known(config, {_KEEPS_FUNCTIONS: dict.fromkeys(_CHOOSING_ATTENTION, "by its arguments")})
        cut = {"aggressive_recomputation": save != "everything", **_known(partitioning, {_KEEPS_OWN_BACKWARDS: True})}
        with partitioning.patch(cut):
            return compile_fx(graph, inputs, config_patches=options)

    return compile_graph


def _known(module: ModuleType, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `settings` that this version of torch has in a module of its own."""
    return {name: value for name, value in settings.items() if hasattr(module, name)}


def restore_blocks(blocks: Iterable[nn.Module]) -> None:
    """Undo `compile_blocks`."""
    for block in blocks:
        block.__dict__.pop("forward", None)


def chooses_what_to_save(block: nn.Module) -> bool:
    """Whether the block takes `save`, what to save for its backward (`saving.py`)."""
    forward = getattr(block.__dict__.get("forward"), "__func__", None)
    return isinstance(forward, CompiledForward) and forward.chooses


def is_compiled(block: nn.Module) -> bool:
    """Whether `compile_blocks` was here."""
    return "forward" in block.__dict__


def missing_compiler(device: torch.device) -> str | None:
    """Why blocks cannot be compiled for `device` on this machine, as half a sentence; None if they can."""
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed (on Windows: triton-windows)"
        if torch.cuda.is_available() and torch.cuda.get_device_capability(device) < _TRITON_CAPABILITY:
            return "the card is older than what triton compiles for"
    if not any(shutil.which(name) for name in (os.environ.get("CC", ""), *_C_COMPILERS) if name):
        return "there is no C compiler"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "Python's C headers are not installed (on Debian: python3-dev)"
    return None


def missing_cpp_compiler(device: torch.device) -> str | None:
    """Why code that queues kernels on `device` cannot be C++ on this machine, as half a sentence; None if it can.

    For cards it includes CUDA's headers, which PyTorch's packages do not bring where the compiler looks for them.
    """
    name = os.environ.get("CXX", _CPP_COMPILERS.get(sys.platform, "g++"))
    if shutil.which(name) is None:
        return f"there is no C++ compiler ({name or 'CXX is empty'})"
    if device.type != "cuda":
        return None
    try:
        from torch.utils.cpp_extension import include_paths

        folders = [*include_paths("cuda"), "/usr/include"]
    except ImportError:
        return "the package setuptools is not installed"
    except OSError:
        folders = []
    if not any((Path(folder) / _CUDA_HEADER).is_file() for folder in folders):
        return "CUDA's headers are not installed (install the CUDA toolkit, or name its folder in CUDA_HOME)"
    return None
