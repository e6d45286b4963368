"""Command lines: the words users type, and what is said of their mistakes."""

import dataclasses
import shlex
from pathlib import Path

import pytest

from wanlora.config.arguments import Command
from wanlora.config.checks import check_paths
from wanlora.config.fields import groups_of, settings_of
from wanlora.config.flags import (
    LATENT_CACHE,
    TEXT_CACHE,
    parse_latent_cache,
    parse_text_cache,
    parse_train,
    train_command,
)
from wanlora.config.musubi import ANSWERED_FLAGS, MUSUBI_FLAGS, Answer
from wanlora.config.train import NetworkConfig, TrainConfig
from wanlora.foundation.errors import ConfigError

CHOICES = {
    "task": ("t2v-1.3B", "t2v-14B", "t2i-14B"),
    "timestep_sampling": ("sigma", "uniform", "sigmoid", "shift", "flux_shift", "logsnr"),
    "weighting_scheme": ("none", "logit_normal", "mode", "cosmap", "sigma_sqrt"),
    "optimizer_type": ("adamw", "adamw8bit", "adafactor"),
    "lr_scheduler": ("constant", "constant_with_warmup", "cosine", "polynomial", "rex"),
    "sample_solver": ("unipc", "euler", "dpm++"),
}
REFUSALS = {"task": {"i2v-14B": "needs a picture"}}
REFERENCE = shlex.split(
    """
 --task t2v-14B --dit wan2.1_t2v_14B_bf16.safetensors --vae wan_2.1_vae.safetensors --t5 models_t5_umt5-xxl-enc-bf16.pth
 --sdpa --blocks_to_swap 10 --mixed_precision bf16 --fp8_base --fp8_scaled --fp8_t5
 --dataset_config style.toml --optimizer_type adamw8bit --learning_rate 5e-5 --gradient_checkpointing
 --max_data_loader_n_workers 2 --persistent_data_loader_workers
 --network_module networks.lora_wan --network_dim 32 --network_alpha 32
 --timestep_sampling shift --discrete_flow_shift 3.0 --save_every_n_epochs 1 --seed 2025
 --output_dir output --output_name style_v01 --log_config --log_with tensorboard --logging_dir logs
 --sample_prompts sampling.txt --save_state --max_train_epochs 50 --sample_every_n_epochs 1
"""
)
SHORT = shlex.split(
    "--dit d.safetensors --dataset_config s.toml --output_dir o --output_name n --network_module networks.lora_wan "
    "--sdpa --optimizer_type adamw --learning_rate 1e-4"
)


def train(*words: str) -> TrainConfig:
    return parse_train([*SHORT, *words], CHOICES, refusals=REFUSALS)


def refusal(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        train(*words)
    return str(caught.value)


def test_the_reference_command_line_means_what_it_says(said: list[str]) -> None:
    config = parse_train(REFERENCE, CHOICES)
    assert config.model.dit == Path("wan2.1_t2v_14B_bf16.safetensors") and config.model.fp8_t5
    assert config.attention.training_kernel == "sdpa" and config.attention.preview_kernel == "sdpa"
    assert config.memory.blocks_to_swap == 10 and config.memory.fp8_mode == "scaled"
    assert config.memory.gradient_checkpointing and config.memory.compile is None
    assert config.run.max_train_epochs == 50 and config.run.seed == 2025 and config.run.mixed_precision == "bf16"
    assert config.run.max_data_loader_n_workers == 2 and config.run.persistent_data_loader_workers
    assert config.optimizer.optimizer_type == "adamw8bit" and config.optimizer.learning_rate == 5e-5
    assert config.network.rank == 32 and config.network.network_alpha == 32.0
    assert config.timesteps.timestep_sampling == "shift" and config.timesteps.discrete_flow_shift == 3.0
    assert config.saving.output_dir == Path("output") and config.saving.output_name == "style_v01"
    assert config.saving.save_every_n_epochs == 1 and config.saving.save_state
    assert config.previews.sample_prompts == Path("sampling.txt") and config.previews.sample_every_n_epochs == 1
    assert config.logging.log_with == "tensorboard" and config.logging.log_config
    assert said == []


def test_the_reference_caching_commands(said: list[str]) -> None:
    latents = parse_latent_cache(shlex.split("--dataset_config style.toml --vae wan_2.1_vae.safetensors"))
    assert latents.dataset_config == (Path("style.toml"),) and latents.vae == Path("wan_2.1_vae.safetensors")
    line = "--dataset_config style.toml --t5 models_t5_umt5-xxl-enc-bf16.pth --batch_size 16"
    texts = parse_text_cache(line.split())
    assert texts.t5 == Path("models_t5_umt5-xxl-enc-bf16.pth") and texts.batch_size == 16
    assert said == []


def test_windows_paths_come_through() -> None:
    config = train("--vae", r"H:\models\new folder\vae.safetensors", "--t5", "H:/models/ü 映画.pth")
    assert str(config.model.vae) == r"H:\models\new folder\vae.safetensors"
    assert config.model.t5 == Path("H:/models/ü 映画.pth")


def test_defaults_are_musubis(said: list[str]) -> None:
    config = parse_train(SHORT[:-5], CHOICES)
    assert (config.optimizer.learning_rate, config.run.max_train_steps) == (2e-6, 1600)
    assert (config.network.rank, config.network.network_alpha) == (4, 1.0)
    assert (config.run.max_data_loader_n_workers, config.timesteps.timestep_sampling) == (8, "sigma")
    assert (config.optimizer.optimizer_type, config.attention.training_kernel) == ("adamw", "sdpa")
    assert said == [
        "no attention kernel is named: --sdpa is used",
        "no --optimizer_type is given: adamw is used",
        "no --learning_rate is given: 2e-06 is used, musubi's default; for a LoRA 5e-5 to 1e-4 is usual",
    ]


def test_caching_takes_several_dataset_files() -> None:
    config = parse_latent_cache(shlex.split("--dataset_config a.toml b.toml --vae v"))
    assert config.dataset_config == (Path("a.toml"), Path("b.toml"))
    assert "'b.toml' belongs to no flag" in refusal("--dataset_config", "a.toml", "b.toml")


def test_a_unique_beginning_of_musubis_flags_is_written_out(said: list[str]) -> None:
    assert train("--max_train_e", "5").run.max_train_epochs == 5
    assert train("--learning=1e-4").optimizer.learning_rate == 1e-4
    assert said == ["--max_train_e is read as --max_train_epochs", "--learning is read as --learning_rate"]


def test_a_whole_name_that_begins_another_is_no_abbreviation(said: list[str]) -> None:
    config = train("--save_state", "--compile")
    assert config.saving.save_state and not config.saving.save_state_on_train_end and config.memory.compile
    assert said == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--network_d", "4"], "--network_d is ambiguous: it could be --network_dim, --network_dropout"),
        (["--dry"], "unknown flag --dry (did you mean '--dry_run'?)"),
        (["--residual", "float32"], "unknown flag --residual"),
        (["--lerning_rate", "1"], "unknown flag --lerning_rate (did you mean '--learning_rate'?)"),
        (["--learning-rate", "1"], "(did you mean '--learning_rate'?)"),
        (["–sdpa"], "'–sdpa' begins with a long dash; type two hyphens: --sdpa"),
        (["-sdpa"], "unknown flag -sdpa; flags begin with two dashes"),
        (["my", "style"], "'my' belongs to no flag; a value with spaces needs quotes"),
        (["^"], "'^' continues a line only as its very last character"),
        (["--seed"], "--seed: expected one argument"),
        (["--sdpa=yes"], "--sdpa/--no_sdpa: ignored explicit argument 'yes'"),
    ],
)
def test_words_that_mean_nothing(words: list[str], message: str) -> None:
    assert message in refusal(*words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--network_dim 0", "--network_dim must be at least 1, got 0"),
        ("--network_dim 4.5", "--network_dim must be a whole number, got '4.5'"),
        ("--learning_rate -1", "--learning_rate must be at least 0, got -1"),
        ("--learning_rate nan", "--learning_rate must be a finite number, got nan"),
        ("--learning_rate fast", "--learning_rate must be a number, got 'fast'"),
        ("--network_dropout 1", "--network_dropout must be at least 0 and below 1, got 1"),
        ("--gradient_accumulation_steps 0", "--gradient_accumulation_steps must be at least 1, got 0"),
        ("--max_train_steps 0", "--max_train_steps must be at least 1, got 0"),
        ("--min_timestep 1001", "--min_timestep must be at least 0 and at most 1000, got 1001"),
        ("--min_timestep 500 --max_timestep 500", "--min_timestep must be below --max_timestep, got 500 and 500"),
        ("--max_timestep 0", "--min_timestep must be below --max_timestep, got 0 and 0"),
        ("--lr_warmup_steps 1.5", "--lr_warmup_steps must be a whole number of steps or a share from 0 to 1, got 1.5"),
        ("--lr_warmup_steps -5", "--lr_warmup_steps must be a whole number of steps or a share"),
        ("--blocks_to_swap -1", "--blocks_to_swap must be at least 0, got -1"),
        ("--save_precision bf17", "--save_precision must be one of float, fp32, fp16, bf16, got 'bf17'"),
        ("--timestep_sampling shft", "got 'shft' (did you mean 'shift'?)"),
        ("--vae_dtype fp8", "--vae_dtype must be one of float32, fp32"),
        ("--task i2v-14B", "--task i2v-14B: needs a picture; choose from t2v-1.3B, t2v-14B, t2i-14B"),
        ("--task t2v14B", "got 't2v14B' (did you mean 't2v-14B'?)"),
        ("--optimizer_type adamw9bit", "got 'adamw9bit' (did you mean 'adamw8bit'?)"),
        ("--base_weights_multiplier 1 x", "--base_weights_multiplier must be a number, got 'x'"),
    ],
)
def test_a_bad_value_is_refused(words: str, message: str) -> None:
    assert message in refusal(*words.split())


@pytest.mark.parametrize(
    "name", ["AdamW8bit", "adamw", "Muon", "prodigyopt.Prodigy", "bitsandbytes.optim.AdEMAMix8bit"]
)
def test_optimizers_by_known_name_class_or_path(name: str) -> None:
    assert train("--optimizer_type", name).optimizer.optimizer_type == name


def test_shares_and_steps_of_the_schedule() -> None:
    config = train("--lr_scheduler", "cosine", "--lr_warmup_steps", "10%")
    assert config.schedule.lr_warmup_steps == 0.1
    assert train("--lr_scheduler", "cosine", "--lr_warmup_steps", "100").schedule.lr_warmup_steps == 100
    assert "got 'adafactor:1e-3'" in refusal("--lr_scheduler", "adafactor:1e-3")


def test_lists_of_arguments() -> None:
    words = "--optimizer_args weight_decay=0.1 betas=0.9,0.99 --network_args rank_dropout=0.1 --base_weights a b"
    config = train(*words.split(), "--base_weights_multiplier", "0.5")
    assert config.optimizer.kwargs == {"weight_decay": 0.1, "betas": (0.9, 0.99)}
    assert config.network.args.rank_dropout == 0.1
    assert config.network.merged_weights == ((Path("a"), 0.5), (Path("b"), 1.0))


def test_negative_numbers_are_no_flags() -> None:
    words = "--base_weights a b --base_weights_multiplier -0.5 -1e-1 --logit_mean -2e-3"
    config = train("--timestep_sampling", "logsnr", *words.split())
    assert config.network.base_weights_multiplier == (-0.5, -0.1) and config.timesteps.logit_mean == -2e-3


def test_every_switch_can_be_turned_off_again() -> None:
    for name in train_command(CHOICES).negations:
        assert vars_of(train(f"--{name[3:]}", f"--{name}"))[name[3:]] is False, name


def vars_of(config: TrainConfig) -> dict[str, object]:
    groups = [getattr(config, name) for name in groups_of(TrainConfig)]
    return {setting.name: getattr(group, setting.name) for group in groups for setting in settings_of(type(group))}


def test_no_compile_and_compile() -> None:
    assert train("--no_compile").memory.compile is False
    assert train("--compile").memory.compile is True


@pytest.mark.parametrize("command", [LATENT_CACHE, TEXT_CACHE, train_command({})], ids=lambda command: command.script)
def test_every_flag_of_musubis_has_a_setting_or_an_answer(command: Command) -> None:
    missing = [name for name in MUSUBI_FLAGS[command.script] if name not in command.names]
    assert missing == []
    assert not set(command.settings) & set(command.answered)


@pytest.mark.parametrize("command", [LATENT_CACHE, TEXT_CACHE, train_command({})], ids=lambda command: command.script)
def test_every_setting_explains_itself_and_no_name_stands_twice(command: Command) -> None:
    listed = [setting.name for group in command.groups.values() for setting in group]
    assert len(listed) == len(set(listed))
    assert all(len(setting.help) > 5 for setting in command.settings.values())


@pytest.mark.parametrize(("name", "found"), ANSWERED_FLAGS.items())
def test_flags_that_are_not_needed_are_acknowledged_and_others_refused(
    name: str, found: Answer, said: list[str]
) -> None:
    words = [f"--{name}"] if found.is_switch else [f"--{name}", "0.5"]

    def parse() -> object:
        if name in ("i2v", "console_back"):
            return parse_latent_cache(["--dataset_config", "s.toml", "--vae", "v", *words])
        return train(*words)

    if found.refused:
        with pytest.raises(ConfigError) as caught:
            parse()
        assert str(caught.value) == f"--{name}: {found.sentence}"
    else:
        parse()
        assert said == [f"--{name} is not needed: {found.sentence}"]


def test_everything_wrong_is_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_train(["--lerning_rate", "5", "--network_dim", "0", "stray", "--one_frame", "--sample_at_first"], CHOICES)
    message = str(caught.value)
    assert message.startswith("10 problems:")
    for flag in ("dit", "dataset_config", "output_dir", "output_name", "network_module"):
        assert f"--{flag} is missing: " in message
    assert "type --network_module networks.lora_wan" in message


def test_a_wrong_value_is_not_also_called_missing() -> None:
    assert refusal("--dit", "") == "--dit must be a path, got an empty text"


def test_caching_without_its_files() -> None:
    with pytest.raises(ConfigError, match=r"(?s)--dataset_config is missing.*--vae is missing"):
        parse_latent_cache([])
    with pytest.raises(ConfigError, match=r"(?s)--dataset_config is missing.*--t5 is missing"):
        parse_text_cache([])
    assert parse_latent_cache(shlex.split("--dataset_config a --debug_mode console")).debug_mode == "console"
    assert parse_text_cache(shlex.split("--dataset_config a --dry_run")).dry_run


def test_help_lists_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_train(["--help"], CHOICES)
    shown = capsys.readouterr().out
    assert caught.value.code == 0
    assert "--network_dim int" in shown and "--task {t2v-1.3B,t2v-14B,t2i-14B}" in shown and "10%" in shown
    assert "huggingface" not in shown


def test_missing_files_are_all_named(tmp_path: Path) -> None:
    (tmp_path / "vae.safetensors").touch()
    config = train("--vae", str(tmp_path / "vea.safetensors"), "--base_weights", str(tmp_path / "x" / "a"))
    with pytest.raises(ConfigError) as caught:
        check_paths(config)
    message = str(caught.value)
    assert f"--vae: there is no {tmp_path / 'vea.safetensors'} (did you mean 'vae.safetensors'?)" in message
    assert f"its folder {tmp_path / 'x'} does not exist either" in message
    assert "--dit: there is no d.safetensors" in message and "output" not in message


def test_files_that_are_there_pass(tmp_path: Path) -> None:
    for name in ("s.toml", "v"):
        (tmp_path / name).touch()
    check_paths(parse_latent_cache(["--dataset_config", str(tmp_path / "s.toml"), "--vae", str(tmp_path / "v")]))


def test_a_config_made_by_hand_is_checked_and_cannot_change() -> None:
    with pytest.raises(ConfigError, match=r"(?s)network_dim must be at least 1, got 0.*network_alpha must be"):
        NetworkConfig(network_dim=0, network_alpha=-1.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        NetworkConfig().network_dim = 8  # type: ignore[misc]
