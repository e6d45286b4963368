"""The generated page of options."""

from wanlora.config.dataset import ImageDatasetConfig, VideoDatasetConfig, dataset_kinds
from wanlora.config.flags import LATENT_CACHE, TEXT_CACHE, train_command
from wanlora.config.options_doc import options_markdown
from wanlora.config.prompts import OPTIONS


def test_the_page_names_every_flag_key_and_prompt_option() -> None:
    page = options_markdown()
    for command in (LATENT_CACHE, TEXT_CACHE, train_command({})):
        section = page.split(f"## {command.script}\n")[1].split("\n## ")[0]
        assert [name for name in (*command.settings, *command.answered) if f"| `--{name}` |" not in section] == []
    keys = {*dataset_kinds(ImageDatasetConfig), *dataset_kinds(VideoDatasetConfig)}
    assert [key for key in keys if f"| `{key}` |" not in page] == []
    assert [option for option in OPTIONS if f"| `--{option}` |" not in page] == []


def test_the_page_gives_types_choices_and_defaults() -> None:
    page = options_markdown({"task": ("t2v-14B", "t2v-1.3B"), "optimizer_type": ("adamw", "adamw8bit")})
    for row in (
        "| `--task` | t2v-14B, t2v-1.3B | `t2v-14B` | Which Wan model is trained. |",
        "| `--learning_rate` | float (at least 0) | `2e-06` |",
        "| `--optimizer_type` | adamw, adamw8bit, a class of torch.optim or a dotted path (package.Class) | `adamw` |",
        "| `--lr_warmup_steps` | steps or share | `0` |",
        "| `--sdpa` | switch | false |",
        "| `target_frames` | list of int (at least 1) | `[1]` |",
        "| `target_fps` | float (above 0) or keep |  |",
        "| `enable_bucket` | true or false | false |",
    ):
        assert row in page


def test_every_row_of_the_page_has_the_columns_of_its_head() -> None:
    for block in options_markdown().split("\n\n"):
        rows = [line.replace("\\|", "").count("|") for line in block.splitlines() if line.startswith("|")]
        assert len(set(rows)) <= 1, block
