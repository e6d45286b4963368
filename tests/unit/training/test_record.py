"""What a LoRA file says about its run."""

import json

from tests.unit.training.conftest import Checked
from wanlora.training.position import Position
from wanlora.training.record import FileRecord


def metadata(checked: Checked, *flags: str) -> dict[str, str]:
    config, prepared = checked(*flags)
    describe = FileRecord(config, prepared, seed=7, total_steps=20, steps_per_epoch=8, num_parameters=123)
    return describe(Position(step=16, epoch=2))


def test_the_settings_of_the_run_are_recorded(checked: Checked) -> None:
    written = metadata(
        checked,
        *("--network_dim", "6", "--network_alpha", "3", "--network_args", "loraplus_lr_ratio=4", "rank_dropout=0.1"),
        *("--optimizer_args", "weight_decay=0.1", "--fp8_base", "--fp8_scaled", "--training_comment", "a note"),
        *("--gradient_accumulation_steps", "2", "--metadata_title", "Studio", "--metadata_author", "me"),
        *("--min_timestep", "100", "--lr_scheduler", "cosine", "--mixed_precision", "bf16"),
    )
    expected = {
        "ss_network_dim": "6",
        "ss_network_alpha": "3.0",
        "ss_steps": "16",
        "ss_epoch": "2",
        "ss_seed": "7",
        "ss_optimizer": "torch.optim.adamw.AdamW(weight_decay=0.1)",
        "ss_fp8_scaled": "True",
        "ss_training_comment": "a note",
        "ss_num_epochs": "3",
        "ss_max_train_steps": "20",
        "ss_num_train_items": "9",
        "ss_num_batches_per_epoch": "8",
        "ss_gradient_accumulation_steps": "2",
        "ss_min_timestep": "100",
        "ss_lr_scheduler": "cosine",
        "ss_mixed_precision": "bf16",
        "ss_output_name": "style",
        "ss_task": "t2v-14B",
        "ss_num_parameters": "123",
        "modelspec.title": "Studio",
        "modelspec.author": "me",
    }
    assert {key: written[key] for key in expected} == expected
    assert json.loads(written["ss_network_args"]) == {"loraplus_lr_ratio": "4", "rank_dropout": "0.1"}
    assert [entry["folder"] for entry in json.loads(written["ss_datasets"])] == ["images", "videos"]
    assert "self_attn.q" in written["ss_target_modules"].split(",")


def test_no_metadata_leaves_the_settings_out(checked: Checked) -> None:
    written = metadata(checked, "--no_metadata", "--training_comment", "a note")
    assert written["ss_network_dim"] == "4"
    assert "ss_seed" not in written and "ss_datasets" not in written and "a note" not in str(written)
