"""Optimizers by name: what is built, with which settings, and what is refused."""

import importlib
from pathlib import Path
from typing import Any

import prodigyopt
import pytest
import schedulefree
import torch
import transformers.optimization
from torch import Tensor, nn

from tests.fresh import run_fresh
from wanlora.config.train import OptimizerConfig
from wanlora.foundation.errors import ConfigError
from wanlora.lora.network import inject
from wanlora.training.optimizers import OptimizerChoice, choose_optimizer, learning_rates, set_mode, without_waiting


def choose(name: str, *arguments: str, rate: float = 3e-4) -> OptimizerChoice:
    config = OptimizerConfig(optimizer_type=name, optimizer_args=arguments, learning_rate=rate)
    return choose_optimizer(config, config.kwargs)


def group(rate: float | None = 3e-4) -> dict[str, Any]:
    return {"params": [nn.Parameter(torch.ones(4, 4))], "lr": rate, "name": "unet"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("adamw", torch.optim.AdamW),
        ("AdamW", torch.optim.AdamW),
        ("RMSprop", torch.optim.RMSprop),
        ("Muon", torch.optim.Muon),
        ("torch.optim.Adafactor", torch.optim.Adafactor),
        ("prodigyopt.Prodigy", prodigyopt.Prodigy),
        ("schedulefree.AdamWScheduleFree", schedulefree.AdamWScheduleFree),
        ("adafactor", transformers.optimization.Adafactor),
    ],
)
def test_a_name_finds_its_class(name: str, expected: type) -> None:
    assert choose(name).maker is expected


def test_the_8bit_optimizer_is_imported_and_used_without_the_compiler() -> None:
    """In a process of its own: here somebody may have loaded it long ago."""
    code = (
        "import sys, torch; before = torch.compile; from wanlora.training.optimizers import OPTIMIZERS; "
        "maker = OPTIMIZERS.get('adamw8bit')(); assert torch.compile is before; "
        "assert not {'torch._dynamo', 'torch._inductor.compile_fx', 'triton'} & set(sys.modules); "
        "from wanlora.memory.compile import does_without_compiler; assert does_without_compiler(recomputes=False); "
        "weight = torch.nn.Parameter(torch.ones(4096)); weight.grad = torch.ones(4096); "
        "maker([weight], lr=0.1).step(); assert (weight < 1).all(); assert 'torch._dynamo' not in sys.modules"
    )
    run_fresh(code)


@pytest.mark.parametrize("name", ["adamw", "SGD", "torch.optim.Adam", "adamw8bit", "prodigyopt.Prodigy"])
def test_which_optimizers_import_the_compiler_is_known(name: str) -> None:
    code = (
        "import sys, torch; from wanlora.config.train import OptimizerConfig; "
        "from wanlora.memory.compile import does_without_compiler; "
        "from wanlora.training.optimizers import choose_optimizer; "
        "choice = choose_optimizer(OptimizerConfig(optimizer_type=sys.argv[1]), {}); "
        "does_without_compiler(recomputes=False); weight = torch.nn.Parameter(torch.ones(4096)); "
        "weight.grad = torch.ones(4096); choice.build([{'params': [weight], 'name': 'unet'}]).step(); "
        "assert choice.asks_compiler or 'torch._dynamo' not in sys.modules, 'it does after all'"
    )
    run_fresh(code, name)


def test_triton_is_neither_imported_for_the_8bit_optimizer_nor_missing_afterwards(tmp_path: Path) -> None:
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("")
    (tmp_path / "triton" / "language.py").write_text("")
    code = (
        "import sys, torch; from wanlora.training.optimizers import OPTIMIZERS; sys.path.append(sys.argv[1]); "
        "OPTIMIZERS.get('adamw8bit')(); assert 'triton' not in sys.modules; "
        "from torch.utils._triton import has_triton_package; assert has_triton_package()"
    )
    run_fresh(code, str(tmp_path))


def test_trying_an_optimizer_does_not_load_the_compiler() -> None:
    code = (
        "import sys, torch; from torch.optim import Optimizer; before = Optimizer.add_param_group; "
        "from wanlora.training.optimizers import OptimizerChoice; choice = OptimizerChoice(name='adamw', "
        "maker=torch.optim.AdamW); choice.build([{'params': [torch.nn.Parameter(torch.zeros(2))], 'name': 'unet'}]); "
        "assert Optimizer.add_param_group is before; assert 'torch._dynamo' not in sys.modules"
    )
    run_fresh(code)


@pytest.mark.parametrize("name", ["adamw8bit", "AdamW8bit", "bitsandbytes.optim.AdamW8bit"])
def test_the_8bit_optimizer_keeps_large_states_in_eight_bits(name: str) -> None:
    weight = nn.Parameter(torch.ones(64, 64))
    optimizer = choose(name).build([{"params": [weight], "lr": 1e-3, "name": "unet"}])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert optimizer.state[weight]["state1"].dtype is torch.uint8
    assert (weight < 1).all()


def test_every_setting_is_read_back_from_the_built_optimizer() -> None:
    arguments = ("weight_decay=0.1", "betas=0.9,0.95", "eps=1e-6")
    optimizer = choose("adamw", *arguments).build([group()])
    built = optimizer.param_groups[0]
    assert (built["lr"], built["weight_decay"], built["betas"], built["eps"]) == (3e-4, 0.1, (0.9, 0.95), 1e-6)


def test_adamw_takes_its_step_in_one_operation_unless_told_how() -> None:
    weights = {}
    for arguments in ((), ("fused=False",), ("foreach=True",)):
        weight = nn.Parameter(torch.linspace(-1, 1, 12))
        optimizer = choose("adamw", *arguments).build([{"params": [weight], "lr": 0.1, "name": "unet"}])
        for scale in (1.0, -3.0):
            weight.grad = torch.arange(12) * scale
            optimizer.step()
        assert bool(optimizer.param_groups[0]["fused"]) == (not arguments)
        weights[arguments] = weight.detach()
    for way in weights.values():
        torch.testing.assert_close(way, weights["fused=False",])


def test_lora_plus_gives_the_up_factors_their_own_rate() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    network = inject(model, ("0",), rank=2, generator=torch.Generator())
    optimizer = choose("adamw").build(network.groups(3e-4, 16.0))
    adapter = network.adapters["0"]
    down, up = optimizer.param_groups
    assert (down["params"], down["lr"]) == ([adapter.lora_down.weight], 3e-4)
    assert (up["params"], up["lr"]) == ([adapter.lora_up.weight], pytest.approx(16 * 3e-4))
    assert learning_rates(optimizer) == {"lr/unet": 3e-4, "lr/unet plus": pytest.approx(16 * 3e-4)}


def test_adafactor_finds_its_own_step_size() -> None:
    choice = choose("adafactor")
    built = choice.build([group(None)]).param_groups[0]
    assert choice.constant_rate
    assert (built["lr"], built["relative_step"]) == (None, True)
    assert learning_rates(choice.build([group(None)])) == {}


def test_adafactor_can_be_given_a_rate() -> None:
    choice = choose("adafactor", "relative_step=False", "scale_parameter=False", "warmup_init=False")
    built = choice.build([group()]).param_groups[0]
    assert not choice.constant_rate
    assert (built["lr"], built["relative_step"], built["scale_parameter"]) == (3e-4, False, False)


def test_prodigys_effective_rate_is_logged() -> None:
    optimizer = choose("prodigyopt.Prodigy", "d0=1e-3", rate=1.0).build([group(1.0)])
    assert learning_rates(optimizer) == {"lr/unet": 1.0, "lr/d*lr/unet": 1e-3}


def test_schedule_free_keeps_its_rate_and_changes_its_mode() -> None:
    choice = choose("schedulefree.AdamWScheduleFree")
    assert choice.constant_rate
    optimizer = choice.build([group()])
    set_mode(optimizer, training=True)
    assert optimizer.param_groups[0]["train_mode"]
    set_mode(optimizer, training=False)
    assert not optimizer.param_groups[0]["train_mode"]


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("Adamw9bit", (), "did you mean 'adamw8bit'"),
        ("no_such_package.Thing", (), "pip install no_such_package"),
        ("torch.optim.Thing", (), "torch.optim has no optimizer class Thing"),
        ("torch.nn.Linear", (), "has no optimizer class Linear"),
        ("adamw", ("lr=1e-3",), "set by --learning_rate"),
        ("LBFGS", (), "evaluates the loss several times"),
    ],
)
def test_what_is_no_optimizer_is_refused(name: str, arguments: tuple[str, ...], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        choose(name, *arguments)
    assert says in str(error.value)


@pytest.mark.parametrize("argument", ["no_such=1", "betas=0.9", "weight_decay=-1"])
def test_arguments_that_an_optimizer_refuses_are_named(argument: str) -> None:
    with pytest.raises(ConfigError, match="refuses its arguments"):
        choose("adamw", argument).build([group()])


@pytest.mark.parametrize(("name", "waits"), [("AdamW8bit", 0), ("PagedAdamW8bit", 3)])
def test_the_host_waits_for_no_update_but_those_of_paged_states(
    name: str, waits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("bitsandbytes.optim.optimizer")
    calls: list[Tensor] = []
    monkeypatch.setattr(module, "sync_gpu", calls.append)
    weights = [nn.Parameter(torch.zeros(8)) for _ in range(2)]
    optimizer = getattr(importlib.import_module("bitsandbytes.optim"), name)(weights)
    for weight in weights:
        weight.grad = torch.ones(8)
    with without_waiting(optimizer):
        optimizer.step()
    assert len(calls) == waits and all(bool((weight < 0).all()) for weight in weights)
    assert module.sync_gpu == calls.append
