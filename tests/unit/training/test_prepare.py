"""Everything that is wrong is listed at once, before a model loads."""

from pathlib import Path

import pytest
import torch

from tests.runs import TrainingFolder
from tests.unit.training.conftest import Checked
from wanlora.data.cache_tensors import write_text
from wanlora.foundation.errors import ConfigError
from wanlora.foundation.files import write_json
from wanlora.training.position import Position
from wanlora.training.state import RunRecord, save_state


def test_several_problems_come_in_one_message(checked: Checked, training_folder: TrainingFolder) -> None:
    for path in (training_folder.folder / "images" / "cache").glob("*_wan.safetensors"):
        path.unlink()
    with pytest.raises(ConfigError) as error:
        checked(
            *("--optimizer_type", "Adamm", "--network_args", "include_patterns=['nothing.*']"),
            *("--lr_scheduler", "rex", "--lr_scheduler_args", "rex_gamma=1", "--blocks_to_swap", "99"),
        )
    message = str(error.value)
    assert message.startswith("5 problems:")
    for part in ("Adamm", "rex_gamma", "--blocks_to_swap", "wan_cache_latents.py", "include_patterns"):
        assert part in message


def test_text_of_another_encoder_is_named_with_its_file(checked: Checked, training_folder: TrainingFolder) -> None:
    path = next((training_folder.folder / "videos" / "cache").glob("*_wan_te.safetensors"))
    caption = (training_folder.folder / "videos" / path.name.replace("_wan_te.safetensors", ".txt")).read_text()
    write_text(path, torch.zeros(3, 48), caption=caption, t5="other")
    with pytest.raises(ConfigError) as error:
        checked()
    assert path.name in str(error.value)
    assert "48 numbers a token where the model reads 64" in str(error.value)
    assert "wan_cache_text_encoder_outputs.py" in str(error.value)


@pytest.mark.parametrize("name", ["torch.optim.lr_scheduler.CosineAnnealingLR", "CosineAnnealingLR"])
def test_a_schedulers_arguments_are_its_own(checked: Checked, name: str) -> None:
    checked("--lr_scheduler_type", name, "--lr_scheduler_args", "T_max=10")
    with pytest.raises(ConfigError, match="T_min"):
        checked("--lr_scheduler_type", name, "--lr_scheduler_args", "T_min=10")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--compile", "--compile_backend", "no_such"], "Invalid backend: 'no_such'"),
        (["--compile", "--compile_mode", "fast"], "Unrecognized mode=fast"),
        (["--compile", "--compile_mode", "tuned", "--compile_backend", "eager"], "--compile_mode tuned is for"),
        (
            ["--compile", "--compile_mode", "tuned", "--deterministic"],
            "--compile_mode tuned chooses kernels by their time",
        ),
        (
            ["--compile", "--compile_mode", "reduce-overhead", "--compile_cpp_wrapper"],
            "--compile_mode reduce-overhead replays CUDA graphs, which torch's compiler does not do with",
        ),
        (["--no_sdpa", "--flash_attn"], "use --mixed_precision bf16"),
        (["--fp8_scaled", "--fp8_fast"], "--fp8_fast gives results in bfloat16, the model runs in float32"),
        (["--optimizer_type", "AdamW", "--optimizer_args", "betas=2"], "refuses its arguments"),
    ],
)
def test_what_would_fail_later_fails_now(checked: Checked, flags: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        checked(*flags)
    assert says in str(error.value)


def test_an_optimizer_of_matrices_only_is_accepted(checked: Checked) -> None:
    _, prepared = checked("--optimizer_type", "Muon")
    assert prepared.optimizer.maker is torch.optim.Muon


def state(folder: Path, epoch_length: int, **settings: str) -> Path:
    """A state whose adapters are of no interest."""
    record = RunRecord(
        position=Position(step=7, epoch=1, batch=3),
        seed=1,
        epoch_length=epoch_length,
        total_steps=20,
        losses=[],
        settings=settings,
    )
    save_state(folder, record, adapter={"x": torch.zeros(1)}, optimizer={}, rates={}, scaler={})
    return folder


def test_a_run_begins_where_its_state_stands_or_anew_if_the_data_changed(
    checked: Checked, training_folder: TrainingFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wanlora.lora.network.LoRANetwork.check_state", lambda self, shapes, source: None)
    _, fresh = checked()
    assert fresh.start == Position()
    length = fresh.plan.num_batches
    _, same = checked("--resume", str(state(training_folder.folder / "a-state", length)))
    assert same.start == Position(step=7, epoch=1, batch=3)
    _, changed = checked("--resume", str(state(training_folder.folder / "b-state", length + 1)))
    assert changed.start == Position(step=7, epoch=1)


def test_a_state_of_another_optimizer_is_refused(
    checked: Checked, training_folder: TrainingFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wanlora.lora.network.LoRANetwork.check_state", lambda self, shapes, source: None)
    same = state(training_folder.folder / "a-state", 3, optimizer_type="torch.optim.AdamW")
    assert checked("--resume", str(same), "--optimizer_type", "adamw")[1].resume is not None
    other = state(training_folder.folder / "b-state", 3, optimizer_type="adamw")
    with pytest.raises(ConfigError, match="was saved with --optimizer_type adamw, this run has Adamax"):
        checked("--resume", str(other), "--optimizer_type", "Adamax")


def test_a_state_of_another_alpha_is_refused(
    checked: Checked, training_folder: TrainingFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wanlora.lora.network.LoRANetwork.check_state", lambda self, shapes, source: None)
    saved = str(state(training_folder.folder / "a-state", 3, network_alpha="4.0"))
    assert checked("--resume", saved, "--network_dim", "4", "--network_alpha", "0")[1].resume is not None
    with pytest.raises(ConfigError, match=r"trained with --network_alpha 4, this run has 8.* 2 times as strong"):
        checked("--resume", saved, "--network_dim", "4", "--network_alpha", "8")


def test_a_state_of_another_format_is_refused(checked: Checked, training_folder: TrainingFolder) -> None:
    folder = training_folder.folder / "a-state"
    write_json(folder / "run.json", {"format": "wanlora state 0"})
    with pytest.raises(ConfigError, match="another version"):
        checked("--resume", str(folder))
