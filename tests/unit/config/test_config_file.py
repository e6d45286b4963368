"""`--config_file`: any training flag from a TOML."""

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from wanlora.config.flags import parse_train
from wanlora.config.train import TrainConfig
from wanlora.foundation.errors import ConfigError

Write = Callable[[str, str], Path]

BASE = shlex.split(
    "--dit d --dataset_config s.toml --output_dir o --output_name n --network_module networks.lora_wan "
    "--sdpa --optimizer_type adamw"
)
CHOICES = {"timestep_sampling": ("sigma", "shift"), "task": ("t2v-14B",)}
REFUSALS = {"task": {"i2v-14B": "needs a picture"}}


def train(write: Write, text: str, *words: str) -> TrainConfig:
    return parse_train([*BASE, "--config_file", str(write("run.toml", text)), *words], CHOICES, refusals=REFUSALS)


def refusal(write: Write, text: str, *words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        train(write, text, *words)
    return str(caught.value)


def test_every_kind_of_flag_comes_from_the_file(write: Write) -> None:
    config = train(
        write,
        """
        gradient_checkpointing = true
        [any_name]
        learning_rate = 5e-5
        network_alpha = 16
        network_args = ["rank_dropout=0.1"]
        lr_scheduler = "cosine"
        lr_warmup_steps = "10%"
        vae = 'H:\\models\\new\\vae.safetensors'
        compile_dynamic = true
        [other]
        base_weights = ["a", "b"]
        base_weights_multiplier = [1, 0.5]
        lr_decay_steps = 100
        """,
    )
    assert config.memory.gradient_checkpointing and config.memory.compile_dynamic == "true"
    assert config.optimizer.learning_rate == 5e-5 and config.network.network_alpha == 16.0
    assert config.network.args.rank_dropout == 0.1 and config.schedule.lr_warmup_steps == 0.1
    assert str(config.model.vae) == r"H:\models\new\vae.safetensors"
    assert config.network.merged_weights == ((Path("a"), 1.0), (Path("b"), 0.5))
    assert config.schedule.lr_decay_steps == 100 and isinstance(config.schedule.lr_decay_steps, int)


def test_the_file_alone_is_enough(write: Write) -> None:
    text = "".join(f"{name} = '{name}'\n" for name in ("dit", "dataset_config", "output_dir", "output_name"))
    path = write("all.toml", text + "network_module = 'networks.lora_wan'\n")
    assert parse_train(["--config_file", str(path)], {}).model.dit == Path("dit")


def test_the_command_line_wins(write: Write) -> None:
    config = train(
        write, "learning_rate = 1\nfp8_base = true\nsave_state = true\n", "--learning_rate", "2", "--no_fp8_base"
    )
    assert config.optimizer.learning_rate == 2.0 and not config.memory.fp8_base and config.saving.save_state


def test_the_suffix_may_be_left_out(write: Write) -> None:
    path = write("style_v1.0.toml", "seed = 7")
    assert parse_train([*BASE, "--config_file", str(path.with_suffix(""))], {}).run.seed == 7


def test_byte_order_mark_and_crlf(write: Write) -> None:
    assert train(write, "\ufeffseed = 7\r\n[a]\r\nmax_train_steps = 9\r\n").run.max_train_steps == 9


def test_a_negation_may_stand_in_the_file(write: Write) -> None:
    assert train(write, "no_compile = true").memory.compile is False
    assert train(write, "no_metadata = true").saving.no_metadata is True


def test_musubis_empty_optimizer_name_means_the_default(write: Write, said: list[str]) -> None:
    path = write("run.toml", 'optimizer_type = ""')
    assert parse_train([*BASE[:-2], "--config_file", str(path)], {}).optimizer.optimizer_type == "adamw"
    assert "no --optimizer_type is given: adamw is used" in said


def test_flags_of_musubis_with_another_answer(write: Write, said: list[str]) -> None:
    train(write, 'async_upload = false\nhuggingface_repo_id = ""\ndynamo_backend = "NO"\ndynamo_mode = "x"')
    answers = [line for line in said if line.startswith("run.toml")]
    assert len(answers) == 1
    assert answers[0].startswith("run.toml line 4: dynamo_mode is not needed: accelerate's dynamo")
    assert "run.toml line 1: async_upload: nothing is uploaded" in refusal(write, "async_upload = true")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lerning_rate = 5", "run.toml line 1: lerning_rate: unknown key (did you mean 'learning_rate'?)"),
        ("[a]\nresolution = 5", "run.toml line 2: resolution: belongs in the dataset file"),
        ('learning_rate = "5e-5"', "learning_rate must be a number, got the text '5e-5': write it without quotes"),
        ("max_train_steps = 1e3", "max_train_steps must be a whole number, got 1000.0: write 1000"),
        ("max_train_steps = true", "max_train_steps must be a whole number, got true"),
        ("gradient_checkpointing = 1", "gradient_checkpointing must be true or false, got 1"),
        ('timestep_sampling = "bogus"', "timestep_sampling must be one of sigma, shift, got 'bogus'"),
        ("timestep_sampling = 3", "timestep_sampling must be one of sigma, shift, got 3"),
        ("output_name = 5", "output_name must be a text in quotes, got 5"),
        ("network_dim = 0", "network_dim must be at least 1, got 0"),
        ("lr_warmup_steps = 1.5", "lr_warmup_steps must be a whole number of steps or a share from 0 to 1"),
        ('network_args = "a=1"', "network_args must be a list, got 'a=1': write ['a=1']"),
        ("network_args = [1]", "network_args must be a text in quotes, got 1"),
        ('task = "i2v-14B"', "task i2v-14B: needs a picture; choose from t2v-14B"),
        ('vae = "C:\\new"', "vae is a path with a control character, got 'C:\\new'"),
        ("[a]\nseed = 1\n[b]\nseed = 2", "run.toml line 4: seed is given twice, in [a] and in [b]"),
        ("seed = 1\n[b]\nseed = 2", "run.toml line 3: seed is given twice, at the top and in [b]"),
        ("[a.b]\nseed = 1", "run.toml: [a.b] lies too deep; sections have one level"),
        ("config_file = 'x'", "config_file: unknown key"),
        ("seed = True", "run.toml line 1: invalid value"),
    ],
)
def test_what_the_file_may_not_say(write: Write, text: str, message: str) -> None:
    assert message in refusal(write, text)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.toml: there is no such file"):
        parse_train([*BASE, "--config_file", str(tmp_path / "nothing")], {})


def test_mistakes_of_file_and_command_line_are_reported_together(write: Write) -> None:
    message = refusal(write, "seed = 1.5\nfoo = 1", "--network_dim", "0")
    assert message.startswith("3 problems:") and "--network_dim" in message and "line 1: seed" in message
