"""Passes replayed as CUDA graphs: the same numbers, in the same memory, and given back."""

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from wanlora.config.train import RunConfig
from wanlora.data.dataset import Batch
from wanlora.diffusion.timesteps import build_plan
from wanlora.diffusion.weighting import LOSS_WEIGHTINGS
from wanlora.foundation.random import Streams
from wanlora.foundation.shapes import LatentShape, PixelShape
from wanlora.lora.network import inject
from wanlora.lora.targets import select_targets
from wanlora.memory.checkpointing import Recompute
from wanlora.memory.compile import compile_blocks, missing_compiler
from wanlora.memory.graphs import CardGraphs
from wanlora.memory.keeping import Keeping
from wanlora.memory.limit import limit_card
from wanlora.models.wan.spec import WanSizes
from wanlora.models.wan.transformer import WanTransformer
from wanlora.training import graphs
from wanlora.training.engine import Engine, set_backends
from wanlora.training.flat import FlatGroups
from wanlora.training.graphs import Replays
from wanlora.training.guard import MemoryGuard
from wanlora.training.objective import FlowObjective, Noise
from wanlora.training.position import Position
from wanlora.training.rates import PureRates
from wanlora.training.step import IndexedBatch, TrainingStep

pytestmark = pytest.mark.gpu

CARD = torch.device("cuda", 0)
SIZES = WanSizes(
    in_channels=4,
    out_channels=4,
    dim=128,
    ffn_dim=256,
    freq_dim=32,
    text_dim=16,
    text_len=64,
    head_dim=64,
    num_layers=3,
)
SMALL, LARGE = PixelShape(64, 64), PixelShape(256, 256, 17)
MIB = 2**20


@pytest.fixture(autouse=True)
def _clean_card() -> Iterator[None]:
    limit_card(CARD, reserve=0.5, at_most=None)
    yield
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


class Run:
    """Steps of a small model with LoRA and dropout; with `mixed` every fourth batch has a longer text."""

    def __init__(
        self,
        *,
        replays: bool,
        compiled: bool = False,
        batches_per_step: int = 1,
        mixed: bool = False,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
        dtype: torch.dtype = torch.float32,
        narrow: bool = True,
    ) -> None:
        self.mixed = mixed
        torch.manual_seed(0)
        model = WanTransformer(SIZES, compute_dtype=dtype, attention="reference")
        generator = torch.Generator().manual_seed(0)
        network = inject(model, select_targets(model), rank=4, alpha=2.0, generator=generator, dropout=0.2)
        for weights in network.weights().values():
            torch.nn.init.normal_(weights.up, std=0.05)
        model.to(CARD).train()
        if compiled:
            compile_blocks(model.blocks, fullgraph=True)
        self.batches_per_step = batches_per_step
        groups = [{"params": list(network.parameters()), "lr": 1e-2}]
        flat = FlatGroups(groups, network, dtype) if narrow else FlatGroups(groups)
        made = optimizer(flat.groups)
        noise = Noise(Streams(7), build_plan(timestep_sampling="uniform"), lambda epoch: [1] * 64)
        guard = MemoryGuard(CARD)
        self.replays = (
            Replays(CardGraphs(torch.device("cuda")), flat, model, Recompute([]), Keeping(0, 0)) if replays else None
        )
        guard.spare = self.replays
        self.step = TrainingStep(
            objective=FlowObjective(model, noise, LOSS_WEIGHTINGS.get("cosmap"), CARD),
            parameters=flat.vectors,
            optimizer=made,
            rates=PureRates(made, lambda step: 1.0),
            engine=Engine(Accelerator(mixed_precision="no")),
            streams=Streams(7),
            max_grad_norm=1.0,
            guard=guard,
            flat=flat,
            replays=self.replays,
        )
        self.taken = 0

    def take(self, pixels: Sequence[PixelShape]) -> list[tuple[float, float]]:
        """Loss and norm of steps on batches of these sizes."""
        return [self._take(size) for size in pixels]

    def _take(self, pixels: PixelShape) -> tuple[float, float]:
        share = [
            IndexedBatch(self.taken + place, self._batch(self.taken + place, pixels))
            for place in range(self.batches_per_step)
        ]
        self.taken += self.batches_per_step
        report = self.step.read(self.step.queue(share, Position(), self.batches_per_step))
        self.step.update(Position())
        return report.loss, report.grad_norm

    def _batch(self, number: int, pixels: PixelShape) -> Batch:
        generator = torch.Generator().manual_seed(number)
        latent = LatentShape.of(pixels)
        latents = torch.randn(1, 4, latent.frames, latent.height, latent.width, generator=generator)
        text = [torch.randn(50 if self.mixed and number % 4 == 3 else 20, 16, generator=generator)]
        return Batch(latents_BCFHW=latents, text=text, names=(f"clip{number}",), pixels=pixels).pin_memory()

    @property
    def weights(self) -> list[Tensor]:
        assert self.step.flat is not None
        return [vector.detach().clone() for vector in self.step.flat.vectors]


def assert_same(one: Run, other: Run, pixels: Sequence[PixelShape]) -> None:
    assert one.take(pixels) == other.take(pixels)
    assert all(map(torch.equal, one.weights, other.weights))


@pytest.fixture
def recorded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every size is recorded at its third pass, however fast the host is."""
    monkeypatch.setattr(graphs, "_BEHIND", 1e9)


@pytest.fixture
def fixed_order() -> Iterator[None]:
    """Kernels add up in the same order every time: the compiler puts one that does not in attention's place.

    Where it would only be warned of, that kernel keeps its disorder.
    """
    set_backends(RunConfig(deterministic=True))
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("compiled", "batches_per_step"), [(False, 1), (True, 2)])
def test_replayed_passes_give_the_same_bits(
    compiled: bool,
    batches_per_step: int,
    monkeypatch: pytest.MonkeyPatch,
    recorded_at_once: None,
    fixed_order: None,
) -> None:
    if compiled and missing_compiler(CARD):
        compiled = False
    monkeypatch.setattr(graphs, "MOST", 2)  # what is not recorded takes its memory from the same pool, in between
    options: dict[str, Any] = {"compiled": compiled, "batches_per_step": batches_per_step, "mixed": True}
    run, plain = Run(replays=True, **options), Run(replays=False, **options)
    assert_same(run, plain, [SMALL, LARGE, SMALL] * 6)
    assert run.replays is not None
    assert 4 <= run.replays.replayed < 18 * batches_per_step
    assert run.replays.is_open


@pytest.mark.parametrize(
    ("compiled", "replays", "batches_per_step"), [(False, False, 2), (True, False, 1), (True, True, 1), (True, True, 2)]
)
def test_factors_cast_once_a_step_give_the_same_bits(
    compiled: bool, replays: bool, batches_per_step: int, recorded_at_once: None, fixed_order: None
) -> None:
    """As factors that are cast in every block, for which other kernels are compiled; graphs read each step's copies."""
    if compiled and missing_compiler(CARD):
        compiled = False
    options: dict[str, Any] = {"compiled": compiled, "batches_per_step": batches_per_step, "dtype": torch.bfloat16}
    run, plain = Run(replays=replays, **options), Run(replays=False, narrow=False, **options)
    assert run.step.flat is not None and run.step.flat.members[0].narrow
    assert_same(run, plain, [SMALL, LARGE] * 6)
    assert run.replays is None or run.replays.replayed > 0


def test_a_card_that_waits_for_the_host_is_recognised() -> None:
    run = Run(replays=True)
    run.take([SMALL] * 8)
    assert run.replays is not None and run.replays.replayed >= 3


def test_a_card_that_is_busy_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(replays=True)
    losses_of = run.step.objective.losses_of

    def longer(inputs: Any) -> Tensor:
        torch.cuda._sleep(200_000_000)  # a tenth of a second of the card's time
        return losses_of(inputs)

    monkeypatch.setattr(run.step.objective, "losses_of", longer)
    run.take([SMALL] * 6)
    assert run.replays is not None and not run.replays.is_open


def test_graphs_and_other_passes_share_their_memory(recorded_at_once: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOST", 1)
    plain = Run(replays=False)
    torch.cuda.reset_peak_memory_stats()
    plain.take([LARGE] * 4)
    with torch.cuda.stream(torch.cuda.Stream()):  # products on a second stream take workspaces, in both runs
        torch.ones(16, 16, device=CARD).matmul(torch.ones(16, 16, device=CARD))
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    del plain
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    run = Run(replays=True)
    run.take([LARGE] * 3)  # the third is recorded, in as much memory as a pass takes
    assert run.replays is not None and run.replays.replayed == 1
    torch.cuda.reset_peak_memory_stats()
    medium = PixelShape(256, 256, 13)
    run.take([LARGE, medium, LARGE, medium])
    assert run.replays.replayed == 3
    assert torch.cuda.max_memory_allocated() < allocated + 8 * MIB
    assert torch.cuda.max_memory_reserved() < reserved + 64 * MIB


def test_everything_is_given_back_and_recorded_anew(recorded_at_once: None) -> None:
    run, plain = Run(replays=True), Run(replays=False)
    assert_same(run, plain, [LARGE] * 5)
    assert run.replays is not None and run.replays.replayed == 3
    held = torch.cuda.memory_reserved()
    run.step.make_room()
    assert torch.cuda.memory_reserved() < held - 50 * MIB
    assert torch.cuda.memory_reserved() < torch.cuda.memory_allocated() + 64 * MIB
    assert_same(run, plain, [LARGE] * 2)
    assert run.replays.replayed == 5
    held = torch.cuda.memory_allocated()
    for _ in range(3):
        run.step.make_room()
        assert_same(run, plain, [LARGE])
    assert torch.cuda.memory_allocated() < held + 8 * MIB


def fails_when_recorded(losses_of: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
    def reading(inputs: Any) -> Tensor:
        losses_B = losses_of(inputs)
        losses_B.sum().item()  # waits for the card, which a recording cannot
        return losses_B

    return reading


def test_a_recording_that_fails_leaves_the_card_as_it_was(
    recorded_at_once: None, caplog: pytest.LogCaptureFixture
) -> None:
    run, plain = Run(replays=True, batches_per_step=2), Run(replays=False, batches_per_step=2)
    for one in (run, plain):
        one.step.objective.losses_of = fails_when_recorded(one.step.objective.losses_of)  # type: ignore[method-assign,assignment]
    assert_same(run, plain, [SMALL] * 4)
    assert caplog.text.count("no pass is replayed as a CUDA graph") == 1
    assert run.replays is not None and not run.replays.is_open and run.replays.replayed == 0
    gc.collect()
    torch.cuda.empty_cache()
    assert_same(run, plain, [LARGE] * 2)


def test_memory_that_runs_out_in_the_pool_gives_it_back(
    recorded_at_once: None, caplog: pytest.LogCaptureFixture
) -> None:
    run, plain = Run(replays=True), Run(replays=False)
    assert_same(run, plain, [SMALL] * 4)
    assert run.replays is not None and run.replays.is_open
    losses_of, failing = run.step.objective.losses_of, [True]

    def once(inputs: Any) -> Tensor:
        losses_B = losses_of(inputs)
        if failing:
            failing.clear()
            torch.empty(2**45, dtype=torch.uint8, device=CARD)
        return losses_B

    run.step.objective.losses_of = once  # type: ignore[method-assign]
    assert_same(run, plain, [LARGE, SMALL, LARGE])
    assert "no pass is replayed as a CUDA graph from now on" in caplog.text
    assert not run.replays.is_open
