"""The validation loss is the same number for the same weights, whoever measures it, and leaves no trace."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.runs import TrainingFolder
from tests.unit.training.parts import CPU, engine, noise
from wanlora.config.dataset import read_datasets
from wanlora.config.outputs import ValidationConfig
from wanlora.data.plan import DataPlan, plan_datasets
from wanlora.diffusion.timesteps import build_plan
from wanlora.diffusion.weighting import LOSS_WEIGHTINGS
from wanlora.foundation import log as log_module
from wanlora.foundation.ranks import Rank
from wanlora.lora.network import LoRANetwork, inject
from wanlora.training.engine import Engine
from wanlora.training.metrics import Metrics, StepLog, read_steps, read_validations
from wanlora.training.objective import FlowObjective
from wanlora.training.position import Position
from wanlora.training.state import ValidationStanding
from wanlora.training.validation import BASE_LOSS, Validation, ValidationSet

LOSS = "loss/validation"
UNIFORM = build_plan("uniform")


class Model(nn.Module):
    """A velocity that depends on latents, timestep and text through one adapted layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16, bias=False)
        nn.init.normal_(self.layer.weight, generator=torch.Generator().manual_seed(1))
        self.calls: list[tuple[int, bool, bool]] = []
        self.broken: list[int] = []
        """Calls that answer with something that is no number."""

    def forward(self, x_BCFHW: Tensor, timestep_B: Tensor, text: Sequence[Tensor]) -> Tensor:
        self.calls.append((len(x_BCFHW), self.training, torch.is_grad_enabled()))
        towards = torch.stack([embedding.float().mean() for embedding in text]) + timestep_B / 1000
        mixed = self.layer(x_BCFHW.movedim(1, -1)).movedim(-1, 1) + towards[:, None, None, None, None]
        return mixed * float("nan") if len(self.calls) - 1 in self.broken else mixed


class Modes(torch.optim.SGD):
    """Remembers the modes it was switched to."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__(parameters, lr=1.0)
        self.modes: list[str] = []

    def train(self) -> None:
        self.modes.append("train")

    def eval(self) -> None:
        self.modes.append("eval")


class OneOfTwo(Engine):
    """Process `index` of two; what the other one gathered is given."""

    def __init__(self, index: int, other: list[Any]) -> None:
        super().__init__(engine().accelerator)
        self.rank = Rank(index, 2)
        self.other = other
        self.given: list[Any] = []

    def gather_objects(self, value: Any) -> list[Any]:
        self.given.append(value)
        parts = [value, self.other.pop(0)] if self.other else [value]
        return parts if self.rank.is_main else parts[::-1]


class Bench:
    """A model with a trained adapter that drops half of what it computes, and what validation logs."""

    def __init__(self, plan: DataPlan, folder: Path) -> None:
        self.plan = plan
        self.model = Model()
        self.network: LoRANetwork = inject(
            self.model, ("layer",), rank=4, generator=torch.Generator().manual_seed(2), dropout=0.5
        )
        self.optimizer = Modes(self.network.parameters())
        self.log = StepLog(folder / "style-steps.jsonl", first_step=0)
        self.tracked: list[tuple[dict[str, float], int]] = []
        self.model.train()

    def train(self, seed: int = 3) -> None:
        """Change the adapter."""
        up = self.network.adapters["layer"].lora_up.weight
        up.data.normal_(generator=torch.Generator().manual_seed(seed))

    def validation(
        self,
        config: ValidationConfig | None = None,
        *,
        on: Engine | None = None,
        plan: DataPlan | None = None,
        standing: ValidationStanding | None = None,
        samples: bool = True,
    ) -> Validation:
        """A new one that logs to the same place."""
        config = config or ValidationConfig()
        metrics = Metrics(position=Position(), total_steps=9, window=3, tracker=self._track, log=self.log, losses=[])
        made = ValidationSet(plan or self.plan, UNIFORM, "none", num_levels=config.validation_levels)
        return Validation(
            config,
            made if samples else None,
            objective=FlowObjective(self.model, noise(), LOSS_WEIGHTINGS.get("none"), CPU),
            network=self.network,
            stream=None,
            optimizer=self.optimizer,
            engine=on or engine(),
            metrics=metrics,
            standing=standing,
        )

    def measure(self, **options: Any) -> float:
        """The loss as it is logged."""
        made = self.validation(**options, standing=ValidationStanding(key="any"))
        made.when_due(Position(step=5, batch=1), epoch_ended=False, ends=True)
        value: float = self.rows[-1][LOSS]
        return value

    def _track(self, values: Mapping[str, float], step: int) -> None:
        self.tracked.append((dict(values), step))

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The log's."""
        return read_validations(self.log.path)


@pytest.fixture
def bench(training_folder: TrainingFolder, tmp_path: Path) -> Bench:
    """Nine samples in eight batches, and an untrained adapter."""
    return Bench(plan_datasets(read_datasets(training_folder.toml)), tmp_path)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """The log of this test."""
    monkeypatch.setattr(log_module.log, "propagate", True)
    caplog.set_level(logging.INFO, logger="wanlora")
    return caplog


def standing(validation: Validation) -> ValidationStanding:
    assert validation.standing is not None
    return validation.standing


def test_the_same_weights_give_the_same_number_every_time(bench: Bench) -> None:
    bench.train()
    first = bench.measure()
    torch.manual_seed(123)
    assert bench.measure() == first
    bench.train(seed=4)
    assert bench.measure() != first


def test_no_trace_is_left(bench: Bench) -> None:
    bench.train()
    bench.network.adapters["layer"].base.eval()  # somebody's wish, which stays
    before = torch.get_rng_state()
    modes = [module.training for module in bench.model.modules()]
    bench.measure()
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in bench.model.modules()] == modes
    assert bench.optimizer.modes == ["eval", "train"]
    assert {(training, grad) for _, training, grad in bench.model.calls} == {(False, False)}
    assert len(bench.model.calls) == 8 * 4
    assert all(parameter.grad is None for parameter in bench.network.parameters())


def test_two_processes_find_what_one_finds(bench: Bench) -> None:
    bench.train()
    alone = bench.measure()
    second = OneOfTwo(1, [])
    bench.measure(on=second)
    assert 0 < len(second.given[0][0]) < 9 * 4
    first = OneOfTwo(0, list(second.given))
    assert bench.measure(on=first) == alone
    assert bench.measure(on=OneOfTwo(1, list(first.given))) == alone


def test_batches_do_not_matter(bench: Bench) -> None:
    bench.train()
    single = [
        replace(dataset, config=replace(dataset.config, batch_size=1)) for dataset in reversed(bench.plan.datasets)
    ]
    assert bench.measure(plan=replace(bench.plan, datasets=tuple(single))) == pytest.approx(bench.measure(), rel=1e-6)


def test_noise_and_level_belong_to_the_sample(bench: Bench) -> None:
    samples = ValidationSet(bench.plan, UNIFORM, "none", num_levels=4)
    latents = torch.zeros(2, 16, 2, 4, 4)
    one, other = (samples.noising(latents, names, 1) for names in (("a", "b"), ("b", "a")))
    assert torch.equal(one.noise_BCFHW, other.noise_BCFHW.flip(0)) and torch.equal(one.t_B, other.t_B.flip(0))
    assert not torch.equal(one.noise_BCFHW[0], one.noise_BCFHW[1]) and one.t_B[0] != one.t_B[1]
    assert not torch.equal(one.noise_BCFHW, samples.noising(latents, ("a", "b"), 2).noise_BCFHW)


def test_levels_are_spread_over_the_law_of_training(bench: Bench) -> None:
    names = [f"clip {number}" for number in range(50)]
    latents = torch.zeros(50, 1, 1, 2, 2)
    for level in range(5):
        t_B = ValidationSet(bench.plan, UNIFORM, "none", num_levels=5).noising(latents, names, level).t_B
        assert level / 5 <= t_B.min() and t_B.max() <= (level + 1) / 5
        assert t_B.max() - t_B.min() > 0.15
    shifted = ValidationSet(bench.plan, build_plan("shift", discrete_flow_shift=9.0), "none", num_levels=1)
    assert shifted.noising(latents, names, 0).t_B.median() > 0.8


def test_the_loss_is_the_weighted_error_of_the_velocity(bench: Bench) -> None:
    samples = ValidationSet(bench.plan, UNIFORM, "none", num_levels=2)
    errors = []
    for batch in (samples.data[spec] for spec in samples.batches):
        for level in range(2):
            made = samples.noising(batch.latents_BCFHW, batch.names, level)
            x0, t = batch.latents_BCFHW.double(), made.t_B.double()[:, None, None, None, None]
            noisy = (1 - t) * x0 + t * made.noise_BCFHW.double()
            with torch.no_grad():
                predicted = bench.model(noisy.float(), 1000 * made.t_B, batch.text).double()
            errors += [float(error.square().mean()) for error in predicted - (made.noise_BCFHW.double() - x0)]
    assert len(errors) == 18
    expected = sum(errors) / 18
    assert bench.measure(config=ValidationConfig(validation_levels=2)) == pytest.approx(expected, rel=1e-5)


def test_an_untrained_adapter_is_the_base_and_measured_once(bench: Bench, said: pytest.LogCaptureFixture) -> None:
    validation = bench.validation()
    validation.at_first(Position())
    (row,) = bench.rows
    assert len(bench.model.calls) == 8 * 4
    assert (row["step"], row["epoch"]) == (0, 0)
    assert row[LOSS] == row[BASE_LOSS] == standing(validation).base == standing(validation).best
    assert bench.tracked == [({LOSS: row[LOSS], BASE_LOSS: row[LOSS]}, 0)]
    shown = f"{row[LOSS]:.4f}"
    assert said.messages[-1] == f"validation: {shown} (base {shown}, best {shown} at step 0)"


def test_the_base_of_a_trained_adapter_is_the_model_without_it(bench: Bench) -> None:
    base = bench.measure()
    bench.train()
    bench.validation().at_first(Position())
    assert bench.rows[-1][BASE_LOSS] == base
    assert bench.rows[-1][LOSS] == bench.measure() != base
    assert bench.network.adapters["layer"].multiplier == 1.0


def test_the_best_is_kept_and_shown(bench: Bench, said: pytest.LogCaptureFixture) -> None:
    validation = bench.validation()
    validation.at_first(Position())
    base = standing(validation).base
    bench.train()
    validation.when_due(Position(step=4, epoch=1), epoch_ended=True, ends=False)
    assert base is not None and bench.rows[-1][LOSS] > base
    assert (standing(validation).best, standing(validation).best_step) == (base, 0)
    assert said.messages[-1] == f"validation: {bench.rows[-1][LOSS]:.4f} (base {base:.4f}, best {base:.4f} at step 0)"
    better = bench.validation(standing=replace(standing(validation), best=99.0))
    better.when_due(Position(step=5, batch=1), epoch_ended=False, ends=True)
    assert (standing(better).best, standing(better).best_step) == (bench.rows[-1][LOSS], 5)


def test_a_resumed_run_goes_on_with_base_and_best(bench: Bench, said: pytest.LogCaptureFixture) -> None:
    before = bench.validation()
    before.at_first(Position())
    resumed = bench.validation(standing=before.standing)
    resumed.at_first(Position(step=7))
    assert len(bench.rows) == 1 and resumed.standing == before.standing
    other = bench.validation(ValidationConfig(validation_levels=2), standing=before.standing)
    other.at_first(Position(step=7))
    assert bench.rows[-1]["step"] == standing(other).best_step == 7
    assert standing(other).key != standing(before).key
    assert "base and best begin anew" in said.text


@pytest.mark.parametrize(
    ("config", "steps"),
    [
        ({}, [2, 4, 5]),
        ({"validate_every_n_epochs": 2}, [4, 5]),
        ({"validate_every_n_steps": 3}, [3, 5]),
        ({"validate_every_n_steps": 4, "validate_every_n_epochs": 1}, [2, 4, 5]),
    ],
)
def test_it_is_measured_when_due_and_once(bench: Bench, config: dict[str, int], steps: list[int]) -> None:
    validation = bench.validation(ValidationConfig(**config, validation_levels=1))
    validation.at_first(Position())
    for step in range(1, 6):  # epochs of two steps
        position = Position(step=step, epoch=step // 2, batch=step % 2)
        validation.when_due(position, epoch_ended=step % 2 == 0, ends=step == 5)
    assert [row["step"] for row in bench.rows] == [0, *steps]


def test_without_samples_nothing_happens(bench: Bench) -> None:
    kept = ValidationStanding(key="x", best=0.5, best_step=3)
    validation = bench.validation(samples=False, standing=kept)
    validation.at_first(Position())
    validation.when_due(Position(step=1, epoch=1), epoch_ended=True, ends=True)
    assert bench.rows == [] and bench.model.calls == [] and validation.standing == kept


def test_a_loss_that_is_no_number_is_said_and_does_not_count(bench: Bench, said: pytest.LogCaptureFixture) -> None:
    validation = bench.validation()
    validation.at_first(Position())
    before = validation.standing
    bench.model.broken = [len(bench.model.calls)]
    validation.when_due(Position(step=2, epoch=1), epoch_ended=True, ends=False)
    assert validation.standing == before
    assert re.search(
        r"loss at step 2 is not a finite number for \S+_wan\.safetensors, \S+; training goes on", said.text
    )
    assert bench.rows[-1] == {"step": 2, "epoch": 1, LOSS: None}


def test_one_that_fails_is_reported_and_training_goes_on(bench: Bench, said: pytest.LogCaptureFixture) -> None:
    validation = bench.validation()
    bench.plan.items[-1].text_path.unlink()
    validation.at_first(Position())
    assert "validation at step 0 failed and is left out; training goes on: " in said.text
    assert bench.plan.items[-1].text_path.name in said.text
    assert bench.rows == [] and bench.optimizer.modes[-1] == "train"
    assert all(module.training for module in bench.model.modules())


def test_what_fails_on_another_process_is_left_out_here_too(bench: Bench, said: pytest.LogCaptureFixture) -> None:
    validation = bench.validation(on=OneOfTwo(0, [({}, "a disk is gone")]))
    validation.when_due(Position(step=1), epoch_ended=False, ends=True)
    assert bench.rows == [] and "a disk is gone" in said.text


def test_lines_of_validation_are_kept_apart_from_those_of_steps(bench: Bench) -> None:
    bench.log.write({"step": 1, "loss": 0.5})
    bench.measure()
    bench.log.write({"step": 6, "loss": 0.4})
    assert read_steps(bench.log.path) == [{"step": 1, "loss": 0.5}, {"step": 6, "loss": 0.4}]
    StepLog(bench.log.path, first_step=5).close()
    assert len(read_steps(bench.log.path)) == len(bench.rows) == 1
