"""Whole runs of the real trainer on a tiny Wan."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.runs import TrainingFolder
from wanlora.cli.train_network import main
from wanlora.config.train import TrainConfig
from wanlora.memory.limit import CardLimit
from wanlora.memory.outlook import Load
from wanlora.memory.streaming import BlockStream
from wanlora.quantization.fast_linear import FastFp8Linear
from wanlora.training import objective
from wanlora.training import run as runs
from wanlora.training.metrics import read_steps, read_validations
from wanlora.training.plan import Target, batches_of
from wanlora.training.position import Position
from wanlora.training.prepare import Prepared
from wanlora.training.state import load_state, read_record


def rows(folder: TrainingFolder, name: str) -> list[dict[str, float]]:
    return read_steps(folder.output / f"{name}-steps.jsonl")


def test_more_epochs_and_other_data_go_on_from_where_a_run_ended(training_folder: TrainingFolder) -> None:
    toml = training_folder.toml
    pictures = toml.read_text().partition("[[datasets]]\nvideo_directory")[0]
    toml.write_text(pictures)
    arguments = training_folder.arguments("style", "--save_state", "--lr_scheduler", "linear")
    training_folder.train([*arguments, "--max_train_epochs", "1"])
    assert read_record(training_folder.output / "style-state").position == Position(step=2, epoch=1)
    longer = [*arguments, "--max_train_epochs", "2", "--save_every_n_steps", "3"]
    text = training_folder.train([*longer, "--resume", "latest"])
    assert "the run now ends at step 4 instead of 2: the learning rate goes on at 0.5 of its base" in text
    toml.write_text(pictures.replace("batch_size = 2", "batch_size = 1"))
    state = training_folder.output / "style-step00000003-state"
    text = training_folder.train([*arguments, "--max_train_epochs", "3", "--resume", str(state)])
    assert "the dataset has changed: 3 batches an epoch instead of 2; epoch 2 begins anew" in text
    assert [row["step"] for row in rows(training_folder, "style")] == list(range(1, 10))
    assert rows(training_folder, "style")[-1]["epoch"] == 3


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_a_state_that_remembers_matrix_by_matrix_is_refused_before_anything_is_loaded(
    name: str, training_folder: TrainingFolder
) -> None:
    arguments = training_folder.arguments("style", "--save_state", "--optimizer_type", name)
    training_folder.train([*arguments, "--max_train_steps", "2"])
    file = training_folder.output / "style-state" / "optimizer.bin"
    parts = torch.load(file, weights_only=True)
    (group,) = parts["optimizer"]["param_groups"]
    assert group["params"] == [0]
    as_before = {"state": {}, "param_groups": [{**group, "params": [0, 1]}]}
    one_matrix = {"state": {0: {"exp_avg": torch.zeros(2, 8)}}, "param_groups": [group]}
    for optimizer in (as_before, one_matrix):
        torch.save({**parts, "optimizer": optimizer}, file)
        assert main([*arguments, "--max_train_steps", "4", "--resume", "latest"]) == 2
        text = training_folder.capture.readouterr().err
        assert "was saved by an earlier version" in text and "matrix by matrix" in text
        assert "Traceback" not in text and text.count("error:") == 1 and "LoRA on" not in text


def test_weights_that_an_earlier_start_kept_train_alike(training_folder: TrainingFolder) -> None:
    kept = training_folder.folder / "kept"
    common = ["--max_train_steps", "2", "--fp8_base", "--fp8_scaled", "--mixed_precision", "bf16"]
    losses = []
    keeping = ["--quantized_cache", str(kept)]
    for name, extra in (("plain", []), ("first", keeping), ("second", keeping)):
        text = training_folder.train(training_folder.arguments(name, *common, *extra))
        losses.append([(row["loss"], row["grad_norm"]) for row in rows(training_folder, name)])
        assert ("of quantised weights in" in text) == (name == "first")
        assert ("the weights are those that an earlier start kept" in text) == (name == "second")
    assert losses[0] == losses[1] == losses[2]
    (copy,) = kept.iterdir()
    copy.write_bytes(copy.read_bytes()[:-10])
    text = training_folder.train(training_folder.arguments("third", *common, *keeping))
    assert f"{copy} is damaged; it is made when the model has been read" in text
    assert [(row["loss"], row["grad_norm"]) for row in rows(training_folder, "third")] == losses[0]
    text = training_folder.train(training_folder.arguments("fourth", "--max_train_steps", "1", *keeping))
    assert "--quantized_cache changes nothing without --fp8_base or --fp8_scaled" in text


_WATCHED = """
import json, sys
from wanlora.cli.entry import run_script
from wanlora.training import build

def noting(*args):
    modules["checks"] = sorted(sys.modules)
    model = load(*args)
    modules["read"] = sorted(sys.modules)
    return model

modules, load, build._load = {}, build._load, noting
code = run_script("wanlora.cli.train_network", sys.argv[2:])
modules["end"] = sorted({"torch._dynamo", "torch._inductor", "sympy"} & set(sys.modules))
open(sys.argv[1], "w").write(json.dumps(modules))
sys.exit(code)
"""


def test_a_start_from_kept_weights_imports_nothing_that_it_does_not_need(training_folder: TrainingFolder) -> None:
    kept, report = training_folder.folder / "kept", training_folder.folder / "modules.json"
    flags = ["--max_train_steps", "1", "--fp8_base", "--fp8_scaled", "--mixed_precision", "bf16"]
    flags += ["--quantized_cache", str(kept), "--optimizer_type", "adamw8bit"]
    training_folder.train(training_folder.arguments("first", *flags))
    command = [sys.executable, "-c", _WATCHED, str(report), *training_folder.arguments("second", *flags)]
    here = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=here, check=True)
    assert "the weights are those that an earlier start kept" in done.stderr
    for moment, modules in json.loads(report.read_text()).items():
        unneeded = {"torch._dynamo", "torch._inductor", "sympy", "triton", "tensorboard", "transformers", "diffusers"}
        unneeded |= {"av", "cv2", "PIL", "ftfy", "huggingface_hub", "tokenizers"}
        assert not unneeded & set(modules), moment
        assert "bitsandbytes" in modules or moment == "end"


def test_validation_is_logged_and_changes_no_step(training_folder: TrainingFolder) -> None:
    common = ["--max_train_steps", "9", "--save_state", "--network_dropout", "0.5", "--optimizer_type", "adamw"]
    training_folder.train(training_folder.arguments("plain", *common))
    training_folder.add_validation()
    logs = training_folder.folder / "logs"
    arguments = training_folder.arguments("style", *common, "--logging_dir", str(logs))
    text = training_folder.train(arguments)
    steps = ("step", "loss", "grad_norm", "items", "t")
    assert [{key: row[key] for key in steps} for row in rows(training_folder, "style")] == [
        {key: row[key] for key in steps} for row in rows(training_folder, "plain")
    ]
    validations = read_validations(training_folder.output / "style-steps.jsonl")
    losses = {row["step"]: row["loss/validation"] for row in validations}
    assert list(losses) == [0, 8, 9] and losses[0] == validations[0]["loss/validation_base"]
    assert len(set(losses.values())) == 3
    (file,) = logs.glob("*/network_train")
    events = EventAccumulator(str(file))
    events.Reload()
    assert {event.step: event.value for event in events.Scalars("loss/validation")} == pytest.approx(losses)
    assert [event.step for event in events.Scalars("loss/validation_base")] == [0]
    standing = read_record(training_folder.output / "style-state").validation
    assert standing is not None and standing.best == min(losses.values())
    shown = f"(base {losses[0]:.4f}, best {standing.best:.4f} at step {standing.best_step})"
    assert f"validation: {losses[9]:.4f} {shown}" in text


def test_a_resumed_run_validates_as_an_unbroken_one(training_folder: TrainingFolder) -> None:
    training_folder.add_validation()
    common = ["--max_train_steps", "4", "--save_state", "--validate_every_n_steps", "2", "--validation_levels", "2"]
    training_folder.train(training_folder.arguments("whole", *common))
    parts = training_folder.arguments("parts", *common, "--save_every_n_steps", "2")
    training_folder.train(parts)
    state = training_folder.output / "parts-step00000002-state"
    training_folder.train([*parts, "--seed", "8", "--resume", str(state)])
    whole, again = (read_validations(training_folder.output / f"{name}-steps.jsonl") for name in ("whole", "parts"))
    assert whole == again and [row["step"] for row in whole] == [0, 2, 4]
    one, other = (read_record(training_folder.output / f"{name}-state").validation for name in ("whole", "parts"))
    assert one == other and one is not None and one.base == whole[0]["loss/validation"]


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_steps_before(
    training_folder: TrainingFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = objective.velocity

    def break_down(x0: torch.Tensor, x1: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return drawn(x0, x1) * (float("nan") if len(calls) == 3 else 1.0)

    calls: list[int] = []
    monkeypatch.setattr(objective, "velocity", break_down)
    code = main(training_folder.arguments("style", "--max_train_steps", "5"))
    text = training_folder.capture.readouterr().err
    assert code == 2
    assert "the loss of step 3 is not a finite number" in text and "_wan.safetensors (t = " in text
    assert "go on with --resume" in text and "Traceback" not in text
    state = load_state(training_folder.output / "style-step00000002-state")
    assert state.record.position.step == 2
    assert all(tensor.isfinite().all() for tensor in state.adapter.values())


def test_transposed_weights_train_alike(training_folder: TrainingFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wanlora.training.build.missing_fp8_maths", lambda device: None)
    common = ["--max_train_steps", "2", "--fp8_base", "--fp8_scaled", "--fp8_fast", "--mixed_precision", "bf16"]
    losses, transpose = [], FastFp8Linear.transpose
    made: list[FastFp8Linear] = []

    def counted(layer: FastFp8Linear) -> None:
        made.append(layer)
        transpose(layer)

    monkeypatch.setattr(FastFp8Linear, "transpose", counted)
    for name in ("auto", "on"):
        text = training_folder.train(training_folder.arguments(name, *common, "--fp8_fast_transposed", name))
        losses.append([(row["loss"], row["grad_norm"]) for row in rows(training_folder, name)])
        assert ("--fp8_fast_transposed on: weights are kept transposed as well" in text) == bool(made) == (name == "on")
    assert losses[0] == losses[1]


def test_memory_that_runs_out_while_loading_is_explained(
    training_folder: TrainingFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_much(*arguments: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("wanlora.training.run.build_trainee", too_much)
    code = main(training_folder.arguments("style", "--max_train_steps", "1"))
    text = training_folder.capture.readouterr().err
    assert code == 2
    assert "does not suffice for the model" in text and "--blocks_to_swap 10" in text and "Traceback" not in text


class Allocator:
    """A card on which every pass needs 100 MiB, whatever is kept."""

    def __init__(self, device: torch.device) -> None:
        assert device.type == "cpu"

    def allocated(self) -> int:
        return 0

    def peak(self) -> int:
        return 100 * 2**20

    def reset(self) -> None:
        pass

    def take_highest(self) -> int:
        return self.peak()

    def retries(self) -> int:
        return 0

    def free(self) -> int:
        return 2**30


def test_blocks_that_are_kept_as_a_card_has_room_change_no_number(
    training_folder: TrainingFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--max_train_steps", "12", "--network_dropout", "0.5", "--gradient_checkpointing")
    training_folder.train(training_folder.arguments("plain", *flags, "--activation_memory", "off"))
    card = CardLimit(total=2**30, others=2**28, reserve=2**28)
    monkeypatch.setattr("wanlora.training.run.limit_card", lambda device, **options: card)
    monkeypatch.setattr("wanlora.training.build.CudaMeter", Allocator)
    text = training_folder.train(training_folder.arguments("style", *flags))
    assert "12 of 12 blocks keep what they computed; peak 0.1 of 0.5 GiB" in text
    same = ("step", "loss", "grad_norm", "items", "t")
    assert [{key: row[key] for key in same} for row in rows(training_folder, "style")] == [
        {key: row[key] for key in same} for row in rows(training_folder, "plain")
    ]
    assert {row["memory/peak_gib"] for row in rows(training_folder, "style")} == {100 / 1024}


def test_numbers_of_swapped_blocks_by_size_change_no_number_and_the_ring_follows_them(
    training_folder: TrainingFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--max_train_steps", "12", "--network_dropout", "0.5", "--gradient_checkpointing", "--trial_step")
    training_folder.train(training_folder.arguments("plain", *flags))
    wanted = {Load(tokens=6, batch=2): 9, Load(tokens=4): 0, Load(tokens=8): 5}

    def decided(config: TrainConfig, prepared: Prepared, target: Target) -> tuple[TrainConfig, Prepared]:
        assert batches_of(prepared.plan).keys() == wanted.keys()
        return config, replace(prepared, swapped=wanted)

    rings, resize = [], BlockStream.resize

    def resized(stream: BlockStream, count: int, **options: int) -> None:
        resize(stream, count, **options)
        rings.append(stream.ring_size)

    card = CardLimit(total=2**30, others=2**28, reserve=2**28)
    monkeypatch.setattr("wanlora.training.run.settle", decided)
    monkeypatch.setattr("wanlora.training.build.num_streamed", lambda *arguments: 11)
    monkeypatch.setattr("wanlora.training.run.limit_card", lambda device, **options: card)
    monkeypatch.setattr("wanlora.training.build.CudaMeter", Allocator)
    monkeypatch.setattr(BlockStream, "resize", resized)
    text = training_folder.train(training_folder.arguments("style", *flags))
    same = ("step", "loss", "grad_norm", "items", "t")
    assert [{key: row[key] for key in same} for row in rows(training_folder, "style")] == [
        {key: row[key] for key in same} for row in rows(training_folder, "plain")
    ]
    first, trial, *others = rings
    assert (first, trial) == (2, 2) and len(others) == 12 and set(others) == {2, 11, 6}
    assert "the memory of every size was foretold within" in text


def test_previews_are_decoded_in_tiles_if_asked(
    training_folder: TrainingFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wanlora.memory.tiling._NARROWEST", 2)
    models, prompts = training_folder.models, training_folder.folder / "prompts.txt"
    prompts.write_text("a shape --w 48 --h 32 --f 5 --s 1 --l 1")
    flags = ("--vae", str(models.vae), "--t5", str(models.t5), "--sample_prompts", str(prompts), "--sample_at_first")
    tiles = ("--max_train_steps", "1", "--vae_tiling", "on")
    text = training_folder.train(training_folder.arguments("style", *flags, *tiles))
    assert "48x32x5 is decoded in 2 tiles (2x1) of 24x32 and what lies around them (--vae_tiling on)" in text
    assert len(list((training_folder.output / "sample").glob("style_*.mp4"))) == 1


def test_what_was_foretold_is_compared_with_the_run(
    training_folder: TrainingFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = CardLimit(total=2**30, others=2**28, reserve=2**28)
    monkeypatch.setattr("wanlora.training.run.limit_card", lambda device, **options: card)
    monkeypatch.setattr("wanlora.training.build.CudaMeter", Allocator)
    flags = ("--max_train_steps", "26", "--gradient_checkpointing")
    lines = training_folder.train(training_folder.arguments("style", *flags)).splitlines()
    assert sum("a step takes 0." in line and "what is left takes about" in line for line in lines) == 1
    (compared,) = [line for line in lines if "the memory of every size was foretold within" in line]
    assert compared.endswith("GiB, measured 0.1")


def run_out(monkeypatch: pytest.MonkeyPatch, calls: set[int]) -> list[int]:
    """Let memory run out in these forward passes; returns the list that they are counted in."""
    drawn, seen = objective.velocity, [0]

    def fail(x0: torch.Tensor, x1: torch.Tensor) -> torch.Tensor:
        seen[0] += 1
        if seen[0] in calls:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return drawn(x0, x1)

    monkeypatch.setattr(objective, "velocity", fail)
    return seen


def test_memory_that_runs_out_in_a_step_is_made_room_for_and_the_run_is_the_same(
    training_folder: TrainingFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--max_train_steps", "5", "--network_dropout", "0.5", "--gradient_accumulation_steps", "2")
    training_folder.train(training_folder.arguments("plain", *flags))
    seen = run_out(monkeypatch, {4})
    text = training_folder.train(training_folder.arguments("style", *flags))
    assert seen == [2 * 5 + 2]  # the failed step runs again from its first batch
    assert "12 blocks that kept what they computed are recomputed from now on" in text
    same = ("step", "loss", "grad_norm", "items", "t")
    assert [{key: row[key] for key in same} for row in rows(training_folder, "style")] == [
        {key: row[key] for key in same} for row in rows(training_folder, "plain")
    ]


def test_memory_that_runs_out_for_good_ends_the_run_with_what_to_change_and_keeps_the_steps_before(
    training_folder: TrainingFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_out(monkeypatch, {3})
    code = main(training_folder.arguments("style", "--max_train_steps", "5", "--on_oom", "stop"))
    text = training_folder.capture.readouterr().err
    assert code == 2 and "Traceback" not in text
    assert "tokens) (" in text and "12 blocks not recomputed" in text
    assert "- --gradient_checkpointing\n" in text and "- --on_oom retry" in text
    assert read_record(training_folder.output / "style-step00000002-state").position.step == 2


def test_readers_that_are_spawned_feed_the_trainer(training_folder: TrainingFolder) -> None:
    arguments = training_folder.arguments("style", "--max_train_steps", "2", "--max_data_loader_n_workers", "1")
    script = training_folder.folder / "train.py"
    script.write_text(
        "import multiprocessing, sys\n"
        "from wanlora.cli.train_network import main\n"
        "if __name__ == '__main__':\n"
        "    multiprocessing.set_start_method('spawn')\n"
        "    sys.exit(main())\n"
    )
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    training_folder.train(training_folder.arguments("plain", "--max_train_steps", "2"))
    same = ("loss", "items", "t")
    assert [{key: row[key] for key in same} for row in rows(training_folder, "style")] == [
        {key: row[key] for key in same} for row in rows(training_folder, "plain")
    ]


def test_a_file_says_what_the_run_was(training_folder: TrainingFolder) -> None:
    training_folder.train(training_folder.arguments("style", "--max_train_steps", "2", "--save_precision", "bf16"))
    with safe_open(training_folder.output / "style.safetensors", framework="pt") as file:
        metadata = file.metadata()
        assert file.get_tensor("lora_unet_blocks_0_ffn_0.lora_up.weight").dtype is torch.bfloat16
    assert (metadata["ss_steps"], metadata["ss_seed"], metadata["ss_save_precision"]) == ("2", "7", "bf16")
    assert len(metadata["sshs_model_hash"]) == 64


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "schedulefree.AdamWScheduleFree"])
def test_a_run_whose_steps_are_queued_ahead_is_the_same_to_the_bit(
    optimizer: str, training_folder: TrainingFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    training_folder.add_validation()
    common = ["--max_train_steps", "9", "--save_state", "--save_every_n_steps", "4", "--optimizer_type", optimizer]
    results = []
    monkeypatch.setattr("wanlora.training.ahead.MOST_TENSORS", 10_000)
    for ahead in (0, 2):
        monkeypatch.setattr(runs, "steps_ahead", lambda config, engine, ahead=ahead: ahead)
        name = f"ahead{ahead}"
        training_folder.train(training_folder.arguments(name, *common, "--validate_every_n_steps", "3"))
        log = (training_folder.output / f"{name}-steps.jsonl").read_text(encoding="utf-8")
        lines = [
            {key: value for key, value in json.loads(line).items() if key != "seconds"} for line in log.splitlines()
        ]
        results.append((lines, load_state(training_folder.output / f"{name}-state")))
    (lines, state), (ahead_lines, ahead_state) = results
    assert lines == ahead_lines and len(read_validations(training_folder.output / "ahead2-steps.jsonl")) == 4
    assert state.adapter.keys() == ahead_state.adapter.keys()
    assert all(torch.equal(state.adapter[key], ahead_state.adapter[key]) for key in state.adapter)
    assert state.record.losses == ahead_state.record.losses
