"""Fp8 maths are measured on the data before they train, and used only where they serve."""

import logging
from typing import NamedTuple

import pytest
import torch

from tests.runs import TrainingFolder
from tests.unit.training.conftest import Checked
from tests.unit.training.parts import CPU, engine
from wanlora.data.order import epoch_batches
from wanlora.diffusion.weighting import LOSS_WEIGHTINGS
from wanlora.foundation.log import log
from wanlora.foundation.random import Streams
from wanlora.quantization.fast_linear import fast_layers
from wanlora.training.build import Trainee, build_trainee
from wanlora.training.fp8_check import _is_trained, check_fp8_maths, sample_batches
from wanlora.training.metrics import read_steps
from wanlora.training.objective import FlowObjective, Noise
from wanlora.training.state import load_state
from wanlora.training.step import IndexedBatch

FLAGS = ("--fp8_scaled", "--fp8_fast", "--mixed_precision", "bf16")


class Run(NamedTuple):
    """What is checked."""

    trainee: Trainee
    objective: FlowObjective
    batches: list[IndexedBatch]

    def check(self) -> None:
        check_fp8_maths(self.trainee, self.objective, self.batches, engine())


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wanlora.training.build.missing_fp8_maths", lambda device: None)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level(logging.INFO, logger="wanlora")
    return caplog


def messages(said: pytest.LogCaptureFixture, level: int) -> list[str]:
    """Each once: the log may have been heard by two handlers."""
    records = {id(record): record for record in said.records}.values()
    return [record.getMessage() for record in records if record.levelno == level]


@pytest.fixture
def run(checked: Checked) -> Run:
    """A model with fp8 maths in compiled blocks, and the batches that it is measured on."""
    config, prepared = checked(*FLAGS, "--compile", "--compile_backend", "aot_eager", "--network_dropout", "0.5")
    trainee = build_trainee(config, prepared, CPU, Streams(7), quiet=True)
    order = epoch_batches(prepared.plan, Streams(7), 0)
    noise = Noise(Streams(7), prepared.timesteps, lambda epoch: [len(batch.indexes) for batch in order])
    objective = FlowObjective(trainee.model, noise, LOSS_WEIGHTINGS.get("none"), CPU)
    return Run(trainee, objective, sample_batches(prepared.plan, order))


def test_a_small_and_a_larger_batch_are_measured_at_their_places_in_the_epoch(run: Run, checked: Checked) -> None:
    assert [str(item.batch.pixels) for item in run.batches] == ["32x32x1", "32x32x5"]
    order = epoch_batches(checked(*FLAGS)[1].plan, Streams(7), 0)
    for item in run.batches:
        assert order[item.index].pixels == item.batch.pixels
        assert all(spec.pixels != item.batch.pixels for spec in order[: item.index])


def test_the_errors_are_printed_and_nothing_is_changed_or_compiled(run: Run, said: pytest.LogCaptureFixture) -> None:
    runner, layers = run.trainee.model.run_block, fast_layers(run.trainee.model)
    before = {name: tensor.clone() for name, tensor in run.trainee.network.state_dict().items()}
    said.clear()
    torch._dynamo.reset()
    counted = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    run.check()
    lines = messages(said, logging.INFO)
    assert len(lines) == 4 and not messages(said, logging.WARNING)
    assert lines[0].startswith("fp8 maths: 120 matrices multiply in fp8; against bf16 maths the outputs err by 2.")
    for item, line in zip(run.batches, lines[1:3], strict=True):
        assert line.startswith(f"fp8 maths against bf16 maths on {item.batch.pixels}: loss ")
        assert "cosine of the gradients 0.99" in line
    assert lines[3].startswith("fp8 maths were measured in ")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == counted
    assert run.trainee.model.run_block is runner and run.trainee.model.training
    assert fast_layers(run.trainee.model) == layers
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.trainee.network.state_dict().items())
    assert all(parameter.grad is None for parameter in run.trainee.network.parameters())


def test_each_batch_is_run_once_in_each_maths_and_the_base_once_more_if_adapters_are_trained(
    run: Run, said: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Untrained, the pass in bf16 maths serves the layers too, and tells of them what a pass of their own would."""
    losses, calls, lines = run.objective.losses, [], []

    def counted(batch, noising):  # type: ignore[no-untyped-def]
        calls.append(batch.pixels)
        return losses(batch, noising)

    monkeypatch.setattr(run.objective, "losses", counted)
    for trained, passes in ((False, 4), (True, 6)):
        monkeypatch.setattr("wanlora.training.fp8_check._is_trained", lambda trainee, trained=trained: trained)
        said.clear()
        calls.clear()
        run.check()
        assert len(calls) == passes
        lines.append(messages(said, logging.INFO)[:3])
    assert lines[0] == lines[1]


def test_adapters_are_trained_once_an_up_factor_is_not_zero(run: Run) -> None:
    assert not _is_trained(run.trainee)
    adapter = next(iter(run.trainee.network.adapters.values()))
    adapter.lora_up.weight.data[0, 0] = 1e-3
    assert _is_trained(run.trainee)


def test_layers_that_err_too_much_keep_bf16_maths(run: Run, said: pytest.LogCaptureFixture) -> None:
    """One huge number in a token leaves nothing for the others."""
    layers = fast_layers(run.trainee.model)
    bad = ["blocks.1.self_attn.q", "blocks.3.ffn.0"]
    for name in bad:
        layers[f"{name}.base"].register_forward_pre_hook(lambda layer, args: (_with_outlier(args[0]),))
        layers[f"{name}.base"].weight.data[:, 0] = 0
    said.clear()
    run.check()
    off = {name.removesuffix(".base") for name in set(layers) - set(fast_layers(run.trainee.model))}
    assert off == {f"blocks.{block}.{kind}" for block in (1, 3) for kind in ("self_attn.q", "ffn.0")}
    (line,) = messages(said, logging.WARNING)
    assert line.startswith(f"fp8 maths: 2 layers err by more than 8% ({bad[0]}, {bad[1]}); bf16 maths are kept in 4 of")


def _with_outlier(x: torch.Tensor) -> torch.Tensor:
    return torch.cat((x.new_full((*x.shape[:-1], 1), 1e6), x[..., 1:]), dim=-1)


def test_a_gradient_of_another_direction_is_a_warning(
    run: Run, said: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wanlora.training.fp8_check.LEAST_COSINE", 0.99999999)
    said.clear()
    run.check()
    warnings = messages(said, logging.WARNING)
    assert len(warnings) == 2
    assert all(line.endswith("training without --fp8_fast would be more exact") for line in warnings)


def test_a_batch_that_does_not_fit_is_left_out_and_named(
    run: Run, said: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = run.objective.losses

    def too_large(batch, noising):  # type: ignore[no-untyped-def]
        if batch.pixels.frames > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return losses(batch, noising)

    monkeypatch.setattr(run.objective, "losses", too_large)
    said.clear()
    run.check()
    (warning,) = set(messages(said, logging.WARNING))
    assert warning == "fp8 maths are not measured on 32x32x5: the card has too little memory left for that"


def test_a_run_with_fp8_maths_can_be_resumed_and_is_then_the_same_run(training_folder: TrainingFolder) -> None:
    common = (*FLAGS, "--max_train_steps", "6", "--save_state")
    whole = training_folder.train(training_folder.arguments("whole", *common))
    assert whole.count("fp8 maths: 120 matrices multiply in fp8") == whole.count("start: ") == 1
    parts = training_folder.arguments("parts", *common)
    training_folder.train([*parts, "--save_every_n_steps", "3"])
    resumed = training_folder.train([*parts, "--resume", str(training_folder.output / "parts-step00000003-state")])
    assert "differs from the saved one" not in resumed
    one, other = (read_steps(training_folder.output / f"{name}-steps.jsonl") for name in ("whole", "parts"))
    assert [(row["loss"], row["grad_norm"]) for row in one] == [(row["loss"], row["grad_norm"]) for row in other]
    adapters = [load_state(training_folder.output / f"{name}-state").adapter for name in ("whole", "parts")]
    assert all(torch.equal(tensor, adapters[1][name]) for name, tensor in adapters[0].items())
