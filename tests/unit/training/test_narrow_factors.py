"""Factors cast once a step: the numbers of factors cast in every block, and no copy that lags behind."""

from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.utils._python_dispatch import TorchDispatchMode

from tests.unit.training.card import BEHIND, Card
from tests.unit.training.conftest import Checked
from tests.unit.training.parts import batch, engine, indexed, noise, objective
from wanlora.foundation.random import Streams
from wanlora.generation.pipeline import evaluating
from wanlora.lora.network import LoRANetwork, inject
from wanlora.lora.targets import select_targets
from wanlora.memory.checkpointing import Kept, Recompute
from wanlora.memory.compile import compile_blocks
from wanlora.memory.keeping import Keeping
from wanlora.models.wan.spec import WanSizes
from wanlora.models.wan.transformer import WanTransformer
from wanlora.training.flat import FlatGroups
from wanlora.training.graphs import Replays
from wanlora.training.guard import MemoryGuard
from wanlora.training.position import Position
from wanlora.training.rates import PureRates
from wanlora.training.step import IndexedBatch, TrainingStep
from wanlora.training.trial import Trial

SIZES = WanSizes(
    in_channels=3, out_channels=3, dim=32, ffn_dim=48, freq_dim=16, text_dim=4, text_len=8, head_dim=16, num_layers=2
)
RANK = 5
"""No other size is 5, nor 15 or 10, the ranks of layers that share an input."""


class Run:
    """Steps of a small Wan with adapters that do something, the same at every call; on a copy of the factors in the
    blocks' format if `narrow`."""

    def __init__(
        self,
        *,
        narrow: bool = True,
        dtype: torch.dtype = torch.bfloat16,
        alpha: float | Callable[[str], float] = RANK,
        ratio: float | None = None,
        **dropouts: Any,
    ) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = WanTransformer(SIZES, compute_dtype=dtype)
        generator, names = torch.Generator().manual_seed(1), select_targets(self.model)
        self.network: LoRANetwork = inject(
            self.model,
            names,
            rank=RANK,
            alpha={name: alpha(name) for name in names} if callable(alpha) else alpha,
            generator=generator,
            **dropouts,
        )
        for adapter in self.network.adapters.values():
            nn.init.normal_(adapter.lora_up.weight, std=0.1, generator=generator)
        self.model.train()
        groups = self.network.groups(0.1, ratio)
        self.flat = FlatGroups(groups, self.network, dtype) if narrow else FlatGroups(groups)
        optimizer = torch.optim.SGD(self.flat.groups, momentum=0.5)
        self.step = TrainingStep(
            objective=objective(self.model, noise()),
            parameters=self.flat.vectors,
            optimizer=optimizer,
            rates=PureRates(optimizer, lambda step: 1.0),
            engine=engine(),
            streams=Streams(7),
            max_grad_norm=0.5,
            scaler=torch.amp.GradScaler("cpu", init_scale=2.0**8) if dtype is torch.float16 else None,
            flat=self.flat,
        )

    def take(self, share: Sequence[IndexedBatch], number: int = 0) -> list[Any]:
        """One step: what it reports, its gradients, and the weights after it."""
        position = Position(step=number)
        report = self.step.read(self.step.queue(share, position, max(len(share), 1)))
        gradients = [vector.grad.tolist() for vector in self.flat.vectors if vector.grad is not None]
        assert len(gradients) == len(self.flat.vectors)
        self.step.update(position)
        assert self.is_cleared
        weights = [vector.tolist() for vector in self.flat.vectors]
        return [report.loss, report.grad_norm, report.timesteps, report.skipped, gradients, weights]

    @property
    def num_lent(self) -> int:
        """Factors that the adapters have copies of."""
        adapters = self.network.adapters.values()
        return sum(factor.narrow is not None for by in adapters for factor in (by.lora_down, by.lora_up))

    @property
    def is_cleared(self) -> bool:
        """Nothing is lent and no gradient is left."""
        leaves = [leaf for member in self.flat.members for leaf in member.leaves]
        return self.num_lent == 0 and all(leaf.grad is None for leaf in leaves)

    def answer(self) -> Tensor:
        """What the model answers outside of steps."""
        item = batch(3)
        with evaluating(self.model), torch.no_grad():
            out: Tensor = self.model(item.latents_BCFHW, torch.tensor([300.0]), item.text)
        return out


def assert_same_steps(**options: Any) -> None:
    run, plain = Run(**options), Run(**options, narrow=False)
    assert run.flat.members[0].narrow and not plain.flat.members[0].narrow
    # One batch, several, one again, none, as the last process of several may have at the end of an epoch.
    for number, share in enumerate([indexed([0]), indexed([1, 2, 3]), indexed([4], size=2), [], indexed([5, 6])]):
        assert run.take(share, number) == plain.take(share, number)


def alpha_of(name: str) -> float:
    """Strengths of their own for all kinds of layers, for one kind 1."""
    return RANK if name.endswith("q") else RANK * (1 + len(name) / 37)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"alpha": RANK / 2},
        {"alpha": alpha_of},
        {"alpha": 3.0, "ratio": 4.0},
        {"dropout": 0.2, "rank_dropout": 0.2, "module_dropout": 0.2},
        {"alpha": 3.0, "dtype": torch.float16},
    ],
)
def test_losses_gradients_and_weights_are_the_same_bits(options: dict[str, Any]) -> None:
    assert_same_steps(**options)


def test_blocks_that_are_recomputed_find_the_copies_in_backward_too(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Recompute] = []

    def recomputing(model: WanTransformer, sizes: WanSizes, **options: Any) -> None:
        constructed(model, sizes, **options)
        model.run_block = Recompute(list(model.blocks), keep=lambda x: Kept(1))
        made.append(model.run_block)

    constructed = WanTransformer.__init__
    monkeypatch.setattr(WanTransformer, "__init__", recomputing)
    assert_same_steps(alpha=3.0, dropout=0.2)
    assert all(runner.recomputed == runner.kept > 0 for runner in made)


def test_gradients_of_several_batches_are_added_up_in_float32() -> None:
    run = Run()
    run.step.queue(indexed([0, 1, 2]), Position(), 3)
    (vector,) = run.flat.vectors
    assert vector.grad is not None and vector.grad.dtype == torch.float32
    assert not torch.equal(vector.grad, vector.grad.bfloat16().float())
    run.step.drop_gradients()
    run.step.queue(indexed([0]), Position(), 1)
    assert vector.grad is not None and torch.equal(vector.grad, vector.grad.bfloat16().float())


@pytest.mark.parametrize("strength", [1, 0.5])
def test_gradients_are_widened_while_they_are_laid_end_to_end(strength: float) -> None:
    """No operation makes a vector of all but the one that the gradient is."""

    class Made(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and not func.is_view and out.numel() >= vector.numel():
                made.append(out.data_ptr())
            return out

    run, made = Run(alpha=strength * RANK), list[int]()
    (member,), (vector,) = run.flat.members, run.flat.vectors
    assert all(adapter.strength == strength for adapter in run.network.adapters.values())
    for leaf in member.leaves:
        leaf.grad = torch.ones_like(leaf)
    with Made():
        run.flat.collect()
    assert vector.grad is not None and vector.grad.unique().tolist() == sorted({1.0, strength})
    assert made == [vector.grad.data_ptr()]


def test_a_step_reads_factors_as_they_are_when_it_begins() -> None:
    """Whatever has changed them: a limit of norms, a state that was loaded, a strength."""
    runs = Run(alpha=3.0), Run(alpha=3.0, narrow=False)
    state = {name: tensor.clone() for name, tensor in runs[0].network.state_dict().items()}
    changes: list[Callable[[LoRANetwork], object]] = [
        lambda network: network.scale_weight_norms(0.05),
        lambda network: network.load_state_dict(state),
        lambda network: network.set_multiplier(0.7),
        lambda network: network.set_multiplier(1.0),
    ]
    for number, change in enumerate(changes):
        for one in runs:
            change(one.network)
        ours, theirs = (one.take(indexed([number]), number) for one in runs)
        assert ours == theirs


def test_outside_of_steps_the_factors_themselves_are_read() -> None:
    run, plain = Run(), Run(narrow=False)
    for number in range(2):
        assert torch.equal(run.answer(), plain.answer())
        for one in (run, plain):
            one.take(indexed([number]), number)
            one.network.scale_weight_norms(0.05)
    with run.network.enabled(False), plain.network.enabled(False):
        assert torch.equal(run.answer(), plain.answer())
    gradient = torch.autograd.grad(run.step.objective(batch(1), 0, 1).value, run.network.parameters())
    assert all(part.dtype == torch.float32 for part in gradient)
    assert any(part.any() for part in gradient)


def test_without_strength_the_base_answers_bit_for_bit_while_copies_are_lent() -> None:
    run = Run()
    with run.flat.lent():
        adapted = run.answer()
        with run.network.enabled(False):
            base = run.answer()
    with run.network.enabled(False):
        assert torch.equal(base, run.answer())
    assert not torch.equal(base, adapted)


def test_a_pass_that_fails_leaves_nothing_and_is_repeated_on_the_same_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    run, plain = Run(alpha=3.0), Run(alpha=3.0, narrow=False)
    losses_of, passes = run.step.objective.losses_of, iter(range(9))

    def failing(inputs: Any) -> Tensor:
        if next(passes) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return losses_of(inputs)

    class Spare:
        is_open = True

        def give_up(self) -> None:
            self.is_open = False

    monkeypatch.setattr(run.step.objective, "losses_of", failing)
    run.step.guard.spare = Spare()
    assert run.take(indexed([0, 1, 2])) == plain.take(indexed([0, 1, 2]))
    assert run.step.guard.retried

    run.step.guard = MemoryGuard(torch.device("cpu"))
    passes = iter([2])
    with pytest.raises(torch.OutOfMemoryError):
        run.step.queue(indexed([3]), Position(), 1)
    run.step.drop_gradients()
    assert run.is_cleared


def test_passes_that_are_replayed_read_the_copies_and_add_up_what_is_left_on_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("wanlora.foundation.log._said", set())
    run, plain = Run(alpha=3.0), Run(alpha=3.0, narrow=False)
    card: Any = Card(behind=dict.fromkeys(range(0, 40, 4), BEHIND))
    replays = Replays(card, run.flat, run.model, Recompute([]), Keeping(0, 0), clock=count(0, 0.1).__next__)
    run.step.replays = run.step.guard.spare = replays
    for number in range(8):
        share = [*indexed([number]), *indexed([number + 1, number + 2][: number % 3])]
        assert run.take(share, number) == plain.take(share, number)
    assert 0 < replays.replayed < 15
    run.step.make_room()
    assert run.flat.members[0].sum is None
    assert run.take(indexed([1, 2]), 9) == plain.take(indexed([1, 2]), 9)


def test_the_trial_computes_with_copies_and_leaves_none(checked: Checked, monkeypatch: pytest.MonkeyPatch) -> None:
    run, lent = Run(), []

    def compute(trial: Trial, item: Any) -> None:
        lent.append(run.num_lent)
        run.step.objective(batch(0), 0, 0).value.backward()

    monkeypatch.setattr(Trial, "_pass", compute)
    Trial(checked()[1].plan, run.step, state_bytes=0.0)()
    assert lent == [len(run.network.parameters())]
    assert run.is_cleared


def test_copies_stay_where_they_are() -> None:
    run = Run(alpha=3.0)
    (member,) = run.flat.members
    assert member.narrow
    places = [leaf.data_ptr() for leaf in member.leaves]
    assert places[0] == member.narrow.vector.data_ptr()
    for number in range(2):
        run.take(indexed([number]), number)
    assert [leaf.data_ptr() for leaf in member.leaves] == places
    assert {leaf.dtype for leaf in member.leaves} == {torch.bfloat16}


def test_copies_are_no_parameters_of_the_model() -> None:
    run = Run()
    names, state = [name for name, _ in run.model.named_parameters()], list(run.model.state_dict())
    with run.flat.lent():
        assert [name for name, _ in run.model.named_parameters()] == names
        assert list(run.model.state_dict()) == state


def test_float32_needs_no_copies() -> None:
    assert Run(dtype=torch.float32).flat.members[0].narrow is None


@pytest.mark.parametrize("narrow", [False, True])
def test_a_compiled_block_casts_no_factor_and_no_gradient_of_one(narrow: bool) -> None:
    seen: list[torch.fx.GraphModule] = []

    def take(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.append(graph)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    run = Run(narrow=narrow, alpha=3.0)
    compile_blocks(run.model.blocks, backend=aot_autograd(fw_compiler=take), dynamic=False)
    run.take(indexed([0]))
    nodes = [node for graph in seen for node in graph.graph.nodes]
    casts = [node.meta["val"].shape for node in nodes if node.target is torch.ops.aten._to_copy.default]
    of_factors = [shape for shape in casts if not {RANK, 2 * RANK, 3 * RANK}.isdisjoint(shape)]
    # Forward: seven down factors, where layers share an input one for all, and ten up factors; backward: the same.
    assert len(seen) == 2 and len(casts) > len(of_factors)
    assert len(of_factors) == (0 if narrow else 2 * (7 + 10))


def test_no_block_is_compiled_again_when_copies_come_and_go() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def take(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    run, plain = Run(alpha=3.0), Run(alpha=3.0, narrow=False)
    compile_blocks(run.model.blocks, backend=take)
    for number in range(3):
        assert run.take(indexed([number]), number) == plain.take(indexed([number]), number)
        assert torch.equal(run.answer(), plain.answer())
        assert len(graphs) == 2  # with gradients and without
