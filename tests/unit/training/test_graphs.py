"""Which passes are replayed, what a replay reads and leaves, and how everything is given back."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from tests.unit.training.card import BEHIND, Card
from tests.unit.training.parts import CPU, PIXELS, Velocity, batch, indexed, measure, objective, step_of
from wanlora.config.train import MemoryConfig, NetworkConfig, OptimizerConfig, TrainConfig
from wanlora.data.dataset import Batch
from wanlora.foundation.log import log
from wanlora.foundation.shapes import LatentShape
from wanlora.memory.checkpointing import Recompute
from wanlora.memory.keeping import Keeping
from wanlora.training import graphs
from wanlora.training.graphs import Replays, choose_replays
from wanlora.training.guard import MemoryGuard
from wanlora.training.position import Position
from wanlora.training.step import IndexedBatch, StepReport, TrainingStep

CARD = torch.device("cuda", 0)
_DEFAULT = TrainConfig()


class Padded(Velocity):
    """Takes texts that are padded already."""

    rope: Any

    def __init__(self) -> None:
        super().__init__()
        self.rope = self
        self.tables: list[LatentShape] = []
        self.dropout = nn.Dropout(0.5)

    def get(self, latent: LatentShape, device: torch.device) -> Tensor:
        self.tables.append(latent)
        return torch.zeros(())

    def pad_text(self, text: Sequence[Tensor], device: torch.device) -> Tensor:
        return torch.stack(list(text))


class Run:
    """Steps of one batch with replays, and the same without."""

    def __init__(self, **card: Any) -> None:
        self.model, self.plain = Padded(), Padded()
        self.card = Card(**card)
        self.recompute = Recompute([])
        self.keeping = Keeping(0, 0)
        self.seconds = 0.0
        self.step = step_of(self.model, flat=True)
        assert self.step.flat is not None
        made: Any = self.card
        self.step.replays = Replays(made, self.step.flat, self.model, self.recompute, self.keeping, clock=self._clock)
        self.step.guard = MemoryGuard(CPU, keeping=self.keeping)
        self.step.guard.spare = self.step.replays
        self.expected = step_of(self.plain, flat=True)

    def _clock(self) -> float:
        self.seconds += 0.1
        return self.seconds

    def take(self, share: Sequence[IndexedBatch], num_batches: int = 1) -> StepReport:
        """One step of both, which must be the same to the bit."""
        reports = [taken(step, share, num_batches) for step in (self.step, self.expected)]
        assert reports[0].loss == reports[1].loss and reports[0].grad_norm == reports[1].grad_norm
        assert torch.equal(self.model.mix, self.plain.mix)
        return reports[0]

    def replayed(self, numbers: Sequence[int], **options: Any) -> list[bool]:
        """Of steps on one batch each."""
        return [self.take(indexed([number], **options)).replayed for number in numbers]


def taken(step: TrainingStep, share: Sequence[IndexedBatch], num_batches: int) -> StepReport:
    report = measure(step, share, Position(), num_batches)
    step.update(Position())
    return report


def test_a_size_in_which_the_card_waited_twice_in_a_row_is_replayed(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    run = Run(behind={1: BEHIND})
    assert run.replayed(range(7)) == [False] * 4 + [True] * 3  # waited, behind, waited, waited
    assert run.card.recorded == 1
    assert caplog.text.count(f"{PIXELS}: the whole pass is replayed as one CUDA graph") == 1


def test_a_size_in_which_the_card_is_behind_never_is() -> None:
    run = Run(behind=dict.fromkeys(range(9), BEHIND))
    assert run.replayed(range(9)) == [False] * 9
    assert not run.card.is_open


def test_neither_passes_that_recompute_nor_those_that_compile_count(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run()
    counts = iter(range(9))
    monkeypatch.setattr(graphs, "compilations", lambda: next(counts))
    assert run.replayed(range(3)) == [False] * 3
    monkeypatch.setattr(graphs, "compilations", lambda: 0)
    losses_of = run.step.objective.losses_of

    def recomputing(inputs: Any) -> Tensor:
        run.recompute.recomputed += 1
        return losses_of(inputs)

    monkeypatch.setattr(run.step.objective, "losses_of", recomputing)
    assert run.replayed(range(4)) == [False] * 4


def test_every_size_text_length_and_number_of_batches_has_a_graph_of_its_own() -> None:
    run = Run()
    run.replayed(range(3))
    assert run.replayed(range(2), size=2) == [False, False]
    long = batch(1)
    long = Batch(latents_BCFHW=long.latents_BCFHW, text=[torch.randn(6, 4)], names=long.names, pixels=long.pixels)
    assert not run.take([IndexedBatch(1, long)]).replayed
    assert not run.take(indexed([3]), num_batches=2).replayed
    assert run.take(indexed([3])).replayed


def test_accumulated_batches_add_up_whether_they_are_replayed_or_not() -> None:
    run = Run(behind=dict.fromkeys(range(0, 40, 3), BEHIND))
    for number in range(6):
        run.take([*indexed([number]), *indexed([number + 1], size=2), *indexed([number + 2])], num_batches=3)
    assert run.card.recorded
    assert run.step.replays is not None and 0 < run.step.replays.replayed < 18


def test_no_more_graphs_than_the_limit_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOST", 1)
    run = Run()
    run.replayed(range(3))
    assert run.replayed(range(4), size=2) == [False] * 4
    assert run.replayed([5]) == [True]


def test_that_no_more_graphs_are_held_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(graphs, "MOST", 2)
    caplog.set_level(logging.INFO)
    run = Run()
    for size in (1, 2):
        run.replayed(range(3), size=size)
    assert "no more are kept" not in caplog.text
    for size in (3, 4):
        run.replayed(range(4), size=size)
    assert caplog.text.count("2 passes are replayed as CUDA graphs, no more are kept") == 1


def test_what_is_given_back_is_recorded_anew_at_once() -> None:
    run = Run()
    run.replayed(range(3))
    run.step.make_room()
    assert not run.card.is_open and run.card.closed == 1
    assert run.step.flat is not None and run.step.flat.members[0].sum is None
    assert run.replayed([3, 4]) == [True, True]
    assert run.card.recorded == 2


def test_a_pass_that_cannot_be_recorded_is_computed_and_nothing_is_tried_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = Run(fails=True)
    assert run.replayed(range(5)) == [False] * 5
    assert run.card.recorded == 1 and not run.card.is_open
    assert caplog.text.count("operation not permitted when stream is capturing") == 1


def test_a_recording_that_fails_between_accumulated_batches_loses_none_of_them() -> None:
    run = Run(fails=True, behind={0: BEHIND})
    for number in range(4):
        run.take([*indexed([number], size=2), *indexed([number + 1])], num_batches=2)
    assert run.card.recorded == 1


def test_memory_that_runs_out_ends_the_replays_first(caplog: pytest.LogCaptureFixture) -> None:
    run = Run()
    run.replayed(range(3))
    failing = [True]
    losses_of = objective(run.model).losses_of

    def once(inputs: Any) -> Tensor:
        if failing and run.card.is_open:
            failing.clear()
            raise torch.OutOfMemoryError("CUDA out of memory")
        return losses_of(inputs)

    run.step.objective.losses_of = once  # type: ignore[method-assign]
    assert run.replayed(range(4), size=2) == [False] * 4
    assert "no pass is replayed as a CUDA graph from now on" in caplog.text
    assert run.replayed([1]) == [False]


def test_what_updates_take_and_what_graphs_take_elsewhere_is_left_to_them_while_there_is_a_pool() -> None:
    class Meter:
        """An update takes 70 bytes."""

        def allocated(self) -> int:
            return 1000

        def peak(self) -> int:
            return 1070

        def __getattr__(self, name: str) -> Any:
            return lambda: 0

    run = Run()
    meter: Any = Meter()
    run.keeping.meter = meter
    asides = []
    for number in range(4):
        run.take(indexed([number]))
        asides.append(run.keeping.aside)
    assert asides == [0, 0, 75, 75]
    run.step.make_room()
    assert run.keeping.aside == 0


def test_tables_of_the_model_are_made_before_the_pass() -> None:
    run = Run()
    run.replayed(range(4))
    assert run.model.tables == [LatentShape.of(PIXELS)] * 4


def streaming() -> Any:
    """A stream of one block."""
    return SimpleNamespace(streamed_indexes=(0,))


def test_a_size_whose_blocks_are_streamed_by_now_is_not_recorded() -> None:
    """Memory ran out in another size between the second time that the card waited and the next pass."""
    run = Run()
    run.replayed(range(2))
    run.recompute.stream = streaming()
    assert run.replayed(range(3)) == [False] * 3
    assert run.card.recorded == 0


def choose(
    config: TrainConfig = _DEFAULT,
    *,
    dtype: torch.dtype = torch.bfloat16,
    flat: bool = True,
    stream: Any = None,
    device: torch.device = CARD,
) -> Replays | None:
    """For a model that is trained so."""
    recompute = Recompute([])
    recompute.stream = stream
    trainee: Any = SimpleNamespace(dtype=dtype, model=Padded(), recompute=recompute, keeping=Keeping(0, 0))
    return choose_replays(config, trainee, step_of(Padded(), flat=True).flat if flat else None, device)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level(logging.INFO, logger="wanlora")
    monkeypatch.setattr("wanlora.foundation.log._said", set())
    return caplog


@pytest.mark.parametrize("asked", ["auto", None])
@pytest.mark.parametrize(
    ("config", "options", "reason"),
    [
        (TrainConfig(), {}, None),
        (TrainConfig(), {"stream": SimpleNamespace(streamed_indexes=())}, None),
        (TrainConfig(), {"stream": streaming()}, "blocks are swapped"),
        (TrainConfig(optimizer=OptimizerConfig(optimizer_type="muon")), {"flat": False}, "--optimizer_type muon"),
        (TrainConfig(), {"dtype": torch.float16}, "float16"),
        (TrainConfig(network=NetworkConfig(network_args=("module_dropout=0.1",))), {}, "by the host"),
        (TrainConfig(memory=MemoryConfig(compile_mode="reduce-overhead")), {}, "--compile_mode"),
    ],
)
def test_what_stands_against_replays_is_said(
    asked: Literal["auto"] | None,
    config: TrainConfig,
    options: dict[str, Any],
    reason: str | None,
    said: pytest.LogCaptureFixture,
) -> None:
    config = replace(config, memory=replace(config.memory, cuda_graphs=asked))
    assert (choose(config, **options) is None) == (reason is not None)
    assert len(set(said.messages)) == (reason is not None)
    assert reason is None or reason in said.text


@pytest.mark.parametrize(
    ("asked", "device", "message"),
    [
        ("off", CARD, None),
        ("off", CPU, None),
        (None, CPU, None),
        ("auto", CPU, "--cuda_graphs auto has no effect on a CPU: there is no card that waits for it"),
    ],
)
def test_off_or_without_a_card_nothing_is_replayed_which_is_said_to_those_who_asked_for_it(
    asked: Literal["auto", "off"] | None, device: torch.device, message: str | None, said: pytest.LogCaptureFixture
) -> None:
    assert choose(TrainConfig(memory=MemoryConfig(cuda_graphs=asked)), device=device) is None
    assert set(said.messages) == ({message} if message else set())
