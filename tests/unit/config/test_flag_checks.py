"""Flags that do not go together, and flags that change nothing."""

import shlex

import pytest

from wanlora.config.flags import parse_latent_cache, parse_train
from wanlora.config.train import TrainConfig
from wanlora.foundation.errors import ConfigError

BASE = (
    "--dit d --dataset_config s.toml --output_dir o --output_name n --network_module networks.lora_wan "
    "--learning_rate 1e-4 --sdpa --optimizer_type adamw "
)


def train(words: str) -> TrainConfig:
    return parse_train(shlex.split(BASE + words), {})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--lr_warmup_steps 100", "type --lr_scheduler constant_with_warmup, or remove the warmup"),
        ("--lr_warmup_steps 10%", "--lr_warmup_steps has no meaning for --lr_scheduler constant"),
        ("--sample_every_n_epochs 1", "--sample_every_n_epochs: previews need prompts; add --sample_prompts"),
        ("--sample_at_first --sample_every_n_steps 5", "--sample_every_n_steps and --sample_at_first: previews need"),
        ("--sample_prompts p.txt --sample_at_first --t5 t", "previews need --vae: the Wan VAE"),
        ("--sample_prompts p.txt --sample_at_first --vae v", "previews need --t5: the text encoder"),
        (
            "--persistent_data_loader_workers --max_data_loader_n_workers 0",
            "--persistent_data_loader_workers needs --max_data_loader_n_workers of at least 1",
        ),
        ("--fp8_fast", "--fp8_fast multiplies weights that are in fp8: add --fp8_scaled"),
        (
            "--fp8_scaled --fp8_base --fp8_fast --fp8_fast_transposed on --blocks_to_swap 3",
            "--fp8_fast_transposed on keeps a second copy of the weights on the GPU, --blocks_to_swap 3 takes the",
        ),
        ("--dim_from_weights", "--dim_from_weights needs --network_weights"),
        (
            "--base_weights a --base_weights_multiplier 1 2",
            "--base_weights_multiplier has 2 values for 1 --base_weights",
        ),
        ("--log_with tensorboard", "--log_with tensorboard needs a folder, for example --logging_dir logs"),
        ("--log_with all", "--log_with all needs a folder"),
        ("--output_name style/v1", "--output_name 'style/v1' is no file name"),
        ("--output_name con", "--output_name 'con' is no file name"),
        ("--optimizer_args a=b=c", "--optimizer_args: 'a=b=c' has two '='"),
        ("--lr_scheduler_type x.Y --lr_scheduler_args a", "--lr_scheduler_args: 'a' is not key=value"),
        ("--network_args rank_drop=1", "--network_args: unknown key 'rank_drop' (did you mean 'rank_dropout'?)"),
    ],
)
def test_contradictions_are_refused(words: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        train(words)
    assert message in str(caught.value) and "problems:" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--fp8_scaled", "--fp8_scaled implies --fp8_base"),
        ("--flash_attn --xformers", "--sdpa, --flash_attn, --xformers name several attention kernels: --sdpa is used"),
        (
            "--no_sdpa --flash_attn --flash3",
            "--flash_attn, --flash3 name several attention kernels: --flash_attn is used",
        ),
        ("--no_sdpa", "no attention kernel is named: --sdpa is used"),
        ("--sage_attn", "--sage_attn serves previews only, because it has no backward pass"),
        (
            "--max_train_epochs 2 --max_train_steps 9",
            "--max_train_steps changes nothing with --max_train_epochs, which ",
        ),
        ("--save_last_n_epochs 3", "--save_last_n_epochs changes nothing without --save_every_n_epochs"),
        ("--save_last_n_steps_state 3", "--save_last_n_steps_state changes nothing without --save_every_n_steps"),
        (
            "--save_every_n_steps 9 --save_last_n_steps_state 3",
            "--save_last_n_steps_state changes nothing without --save_state",
        ),
        ("--sample_prompts p.txt", "--sample_prompts makes no previews without --sample_every_n_epochs, "),
        (
            "--base_weights a b --base_weights_multiplier 1",
            "--base_weights: the last 1 without a multiplier are merged ",
        ),
        (
            "--lr_scheduler cosine --lr_scheduler_power 2",
            "--lr_scheduler_power changes nothing with --lr_scheduler cosine",
        ),
        ("--lr_scheduler_type x.Y --lr_warmup_steps 5", "--lr_warmup_steps changes nothing with --lr_scheduler_type, "),
        (
            "--network_weights w --dim_from_weights --network_dim 4",
            "--network_dim changes nothing with --dim_from_weights",
        ),
        ("--log_config", "--log_config changes nothing without --logging_dir or --log_with"),
        ("--logging_dir l --wandb_run_name w", "--wandb_run_name changes nothing without --log_with wandb"),
        ("--block_swap_h2d_only", "--block_swap_h2d_only changes nothing without --blocks_to_swap"),
        (
            "--gradient_checkpointing_cpu_offload",
            "--gradient_checkpointing_cpu_offload changes nothing without --gradient_",
        ),
        ("--fp8_fast_transposed off", "--fp8_fast_transposed changes nothing without --fp8_fast"),
        ("--no_compile --compile_mode x", "--compile_mode changes nothing with --no_compile"),
        ("--no_compile --compile_cpp_wrapper", "--compile_cpp_wrapper changes nothing with --no_compile"),
        (
            "--compile_backend eager --compile_cpp_wrapper",
            "--compile_cpp_wrapper changes nothing with --compile_backend eager: only inductor writes code in C++",
        ),
        ("--preserve_distribution_shape", "--preserve_distribution_shape changes nothing without --min_timestep or "),
    ],
)
def test_what_changes_nothing_or_decides_silently_is_said_once(words: str, message: str, said: list[str]) -> None:
    train(words)
    train(words)
    assert len(said) == 1 and said[0].startswith(message)


@pytest.mark.parametrize(
    ("words", "unread"),
    [
        ("--logit_std 2", ["--logit_std changes nothing with --weighting_scheme none"]),
        ("--mode_scale 1 --weighting_scheme cosmap", ["--mode_scale changes nothing with --weighting_scheme cosmap"]),
        ("--weighting_scheme logit_normal --logit_std 2", []),
        ("--weighting_scheme mode --mode_scale 1", []),
        ("--timestep_sampling logsnr --logit_mean 1", []),
        ("--preserve_distribution_shape --min_timestep 5", []),
    ],
)
def test_options_that_the_weighting_scheme_does_not_read_are_named(
    words: str, unread: list[str], said: list[str]
) -> None:
    train(words)
    assert said == unread


def test_an_ordinary_run_is_silent(said: list[str]) -> None:
    train(
        "--fp8_base --fp8_scaled --fp8_fast --save_every_n_epochs 1 --save_last_n_epochs 2 --sample_prompts p.txt "
        "--vae v --t5 t --sample_every_n_epochs 1 --logging_dir l --log_config --blocks_to_swap 9 "
        "--block_swap_ring_size 3 --lr_scheduler constant_with_warmup --lr_warmup_steps 5 --base_weights a "
        "--base_weights_multiplier 1"
    )
    assert said == []


def test_showing_timesteps_needs_no_files(said: list[str]) -> None:
    assert parse_train(["--show_timesteps", "console"], {}).run.show_timesteps == "console"
    with pytest.raises(ConfigError, match=r"(?s)^2 problems:.*--output_dir is missing.*--output_name is missing"):
        parse_train(["--show_timesteps", "image"], {})


def test_console_options_without_the_console(said: list[str]) -> None:
    parse_latent_cache(shlex.split("--dataset_config s.toml --vae v --console_width 40"))
    assert said == ["--console_width changes nothing without --debug_mode"]


def test_a_look_at_the_noise_levels_speaks_of_nothing_else(said: list[str]) -> None:
    parse_train(["--show_timesteps", "console"], {})
    assert said == []


def test_showing_noise_levels_speaks_of_nothing_else(said: list[str]) -> None:
    parse_train(["--show_timesteps", "console"], {})
    assert said == []


def test_a_learning_rate_of_zero_is_said(said: list[str]) -> None:
    train("--learning_rate 0")
    assert "--learning_rate 0: nothing is learned; the LoRA stays as it begins" in said
