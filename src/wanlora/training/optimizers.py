"""Optimizers by name.

Three names are known by heart (adamw, adamw8bit, adafactor); any class of `torch.optim` and any dotted path to an
optimizer class works as well. Optional packages are imported when their optimizer is asked for.
"""

import importlib
import importlib.util
import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from wanlora.config.train import OptimizerConfig
from wanlora.foundation.errors import ConfigError, did_you_mean
from wanlora.foundation.log import say_once
from wanlora.foundation.registry import Registry

ParameterGroups = list[dict[str, Any]]
Maker = Callable[..., Optimizer]

_ELEMENTWISE = {"adamw", "adamw8bit"}
_WAYS = {"fused", "foreach", "capturable", "differentiable"}
"""Arguments of torch.optim that say how a step is computed."""
_UNFIT = (Optimizer, torch.optim.SparseAdam)
"""Classes of torch.optim that take no step on ordinary gradients."""

_TRIAL_SIZE = (256, 1024)
"""Large enough for what an optimizer keeps once to count for nothing."""
_LIKE_ADAM = 8.0

OPTIMIZERS: Registry[Callable[[], Maker]] = Registry("optimizer_type")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerChoice:
    """An optimizer class that can be imported, and its arguments."""

    name: str
    maker: Maker
    arguments: Mapping[str, Any] = field(default_factory=dict)
    constant_rate: bool = False
    """The optimizer schedules itself; the learning rate it is given stays."""

    @property
    def treats_numbers_alone(self) -> bool:
        """Whether it is known not to look at the shapes of what it updates (see `flat.py`)."""
        return self.name.lower() in _ELEMENTWISE

    @property
    def asks_compiler(self) -> bool:
        """Whether its steps import torch's compiler, which those of torch's own optimizers do."""
        return getattr(self.maker, "__module__", "").startswith("torch.optim")

    def build(self, groups: ParameterGroups) -> Optimizer:
        """The optimizer over `groups`. Raises `ConfigError` when it refuses its arguments."""
        try:
            with _without_asking_compiler():
                return self.maker(groups, **self.arguments)
        except (TypeError, ValueError, KeyError, AssertionError, RuntimeError) as error:
            given = " ".join(f"{key}={value}" for key, value in self.arguments.items() if key != "lr")
            raise ConfigError(
                f"--optimizer_type {self.name} refuses its arguments ({error}); check --optimizer_args {given}"
            ) from error


@OPTIMIZERS.register("adamw")
def _adamw() -> Maker:
    return torch.optim.AdamW


@OPTIMIZERS.register("adamw8bit")
def _adamw8bit() -> Maker:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError("--optimizer_type adamw8bit needs bitsandbytes: pip install bitsandbytes; or use adamw")
    with _without_notes_on_cpu_kernels(), _without_compilers():
        maker: Maker = importlib.import_module("bitsandbytes.optim").AdamW8bit
    return maker


@contextmanager
def _without_notes_on_cpu_kernels() -> Iterator[None]:
    """While it is imported, bitsandbytes warns that it did not find a 4-bit CPU kernel, which nothing here uses."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.addFilter(_names_no_cpu_kernel)
    try:
        yield
    finally:
        logger.removeFilter(_names_no_cpu_kernel)


@contextmanager
def _without_compilers() -> Iterator[None]:
    """While it is imported, bitsandbytes hands its kernels for processors to `torch.compile`, which loads the compiler.

    That takes more than a second, is needed by nothing of a card's, and costs a processor far more in compiling than
    it saves; so these functions stay as they are written. So do its operators, which torch would load the compiler for
    at their first call, to exclude them from what is compiled; nothing compiled calls an optimizer's. Triton, which it
    imports too, makes nothing for CUDA there.
    """
    compile_, exclude, hides = torch.compile, torch._disable_dynamo, "triton" not in sys.modules
    torch.compile = torch._disable_dynamo = _as_it_is  # type: ignore[assignment]
    if hides:
        sys.modules["triton"] = None  # type: ignore[assignment]  # an import of it fails, as where there is none
    try:
        yield
    finally:
        torch.compile, torch._disable_dynamo = compile_, exclude
        if hides:
            del sys.modules["triton"]


@contextmanager
def _without_asking_compiler() -> Iterator[None]:
    """Let optimizers take their parameters without the compiler, which torch imports to tell it to stay out of that.

    The import takes longer than all other checks of a start. No compiled code makes an optimizer here.
    """
    add = Optimizer.add_param_group
    Optimizer.add_param_group = inspect.unwrap(add)  # type: ignore[method-assign]
    try:
        yield
    finally:
        Optimizer.add_param_group = add  # type: ignore[method-assign]


def _as_it_is(model: Any = None, **options: Any) -> Any:
    """A `torch.compile` that compiles nothing, and an exclusion from it that excludes nothing."""
    return _as_it_is if model is None else model


def _names_no_cpu_kernel(record: logging.LogRecord) -> bool:
    return "gemm_4bit" not in record.getMessage()


@OPTIMIZERS.register("adafactor")
def _adafactor() -> Maker:
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError("--optimizer_type adafactor needs transformers: pip install transformers; or use adamw8bit")
    maker: Maker = importlib.import_module("transformers.optimization").Adafactor
    return maker


def choose_optimizer(config: OptimizerConfig, arguments: Mapping[str, Any]) -> OptimizerChoice:
    """Find and import the class behind `--optimizer_type`; `arguments` are the parsed `--optimizer_args`."""
    name = config.optimizer_type or "adamw"
    if "lr" in arguments:
        raise ConfigError("--optimizer_args lr: the learning rate is set by --learning_rate; remove lr")
    chosen: dict[str, Any] = {"lr": config.learning_rate, **arguments}
    if name.lower() == "adamw" and not _WAYS & set(arguments):
        chosen["fused"] = True  # the same numbers from one operation instead of a dozen, on every device
    if name.lower() in OPTIMIZERS.names:
        maker = OPTIMIZERS.get(name.lower())()
    else:
        maker = _dotted(name) if "." in name else _from_torch(name)
    if _wants_closure(maker):
        raise ConfigError(
            f"--optimizer_type {name} evaluates the loss several times a step, which is not done here; use adamw8bit"
        )
    constant = name.lower().endswith("schedulefree")
    if name.lower() == "adafactor" and chosen.get("relative_step", True):
        chosen |= {"relative_step": True, "lr": None}
        constant = True
        say_once(
            "adafactor sets its own step size (relative_step); --learning_rate and --lr_scheduler have no effect. "
            "For a fixed rate add --optimizer_args relative_step=False scale_parameter=False warmup_init=False"
        )
    return OptimizerChoice(name=name, maker=maker, arguments=chosen, constant_rate=constant)


def _wants_closure(maker: Maker) -> bool:
    """Whether a step of the optimizer cannot be taken without calling the loss again."""
    closure = inspect.signature(getattr(maker, "step")).parameters.get("closure")  # noqa: B009
    return closure is not None and closure.default is inspect.Parameter.empty


def _from_torch(name: str) -> Maker:
    classes = {
        attribute: value
        for attribute, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, Optimizer) and value not in _UNFIT
    }
    if name not in classes:
        known = [*OPTIMIZERS.names, *classes]
        raise ConfigError(
            f"unknown --optimizer_type {name!r}{did_you_mean(name, known)}; known: {', '.join(known)}, "
            "or the dotted path of a class such as prodigyopt.Prodigy"
        )
    return classes[name]


def _dotted(path: str) -> Maker:
    module_name, _, class_name = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        package = module_name.split(".")[0]
        raise ConfigError(f"--optimizer_type {path} cannot be imported ({error}); pip install {package}?") from error
    with suppress(AttributeError):
        found = getattr(module, class_name)
        if isinstance(found, type) and issubclass(found, Optimizer):
            return found
    raise ConfigError(f"--optimizer_type {path}: {module_name} has no optimizer class {class_name}")


def state_bytes(choice: OptimizerChoice) -> float:
    """Bytes that the optimizer remembers of each trained number, found by a step on a matrix of its own.

    8, two float32 numbers as Adam has them, where the optimizer does not take such a step on the CPU; that is said.
    """
    matrix = torch.nn.Parameter(torch.ones(_TRIAL_SIZE))
    matrix.grad = torch.ones_like(matrix)
    try:
        optimizer = choice.build([{"params": [matrix], "lr": choice.arguments["lr"], "name": "unet"}])
        set_mode(optimizer, training=True)
        optimizer.step()
    except Exception as error:  # somebody else's code, on a device that it may not be made for
        say_once(
            f"--optimizer_type {choice.name} takes no step on the CPU ({type(error).__name__}); what it remembers is "
            f"planned as {_LIKE_ADAM:.0f} bytes a trained number, as of Adam"
        )
        return _LIKE_ADAM
    remembered = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum(value.numel() * value.element_size() for value in remembered) / matrix.numel()


def set_mode(optimizer: Optimizer, *, training: bool) -> None:
    """Tell optimizers that keep two sets of weights (schedule-free ones) which to show."""
    switch = getattr(optimizer, "train" if training else "eval", None)
    if callable(switch):
        switch()


@contextmanager
def without_waiting(optimizer: Optimizer) -> Iterator[None]:
    """Let bitsandbytes queue its updates and go on: it stops the host after each, for which only paged states have use.

    Paged optimizers are left alone.
    """
    module: Any = sys.modules.get("bitsandbytes.optim.optimizer")
    wait = getattr(module, "sync_gpu", None)
    if wait is None or getattr(optimizer, "is_paged", True):
        yield
        return
    module.sync_gpu = _go_on
    try:
        yield
    finally:
        module.sync_gpu = wait


def _go_on(parameter: Tensor) -> None:
    pass


def learning_rates(optimizer: Optimizer) -> dict[str, float]:
    """The rates to log: one per named group and, for optimizers that adapt it, the effective one."""
    rates: dict[str, float] = {}
    for group in optimizer.param_groups:
        name, rate = group["name"], group["lr"]
        if rate is not None:
            rates[f"lr/{name}"] = float(rate)
            if "d" in group:
                rates[f"lr/d*lr/{name}"] = float(group["d"]) * float(rate)
    return rates
