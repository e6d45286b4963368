"""Flags, config files and prompt files that are wrong: one message, exit code 2, nothing touched."""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.integration.bench import CACHING, LATENTS, PREVIEWS, TRAIN, TRAINING, Bench, Case, check, parametrised
from wanlora.cli.main import main as wanlora_main

Spoil = Callable[[Bench], object]


def prompts(*lines: str, name: str = "prompts.txt") -> Spoil:
    """Write another prompt file."""
    return lambda bench: bench.write(name, "\n".join((*lines, "")))


def config_file(*lines: str) -> Spoil:
    """Write `run.toml`."""
    return prompts(*lines, name="run.toml")


FLAGS = {
    "unknown flag": Case(flags=("--lerning_rate", "1e-4"), says=("--lerning_rate", "did you mean '--learning_rate'?")),
    "ambiguous beginning": Case(flags=("--lr_scheduler_t", "x"), says=("--lr_scheduler_t is ambiguous", "_timescale")),
    "long dash": Case(flags=("–debug",), says=("begins with a long dash", "type two hyphens: --debug")),
    "Windows continuation in the line": Case(flags=("^",), says=("'^' continues a line only as its very last",)),
    "value without a flag": Case(flags=("my", "style"), says=("'my' belongs to no flag", "needs quotes")),
    "flag without its value": Case(flags=("--network_alpha",), says=("--network_alpha", "expected one argument")),
    "everything required is missing": Case(
        without=("--dit", "--output_dir", "--output_name", "--network_module", "--dataset_config"),
        says=(
            "5 problems",
            "--dit is missing",
            "--output_dir is",
            "--output_name is",
            "type --network_module networks",
        ),
    ),
    "wrong choice": Case(
        flags=("--timestep_sampling", "shfit"), says=("--timestep_sampling must be one of", "did you mean 'shift'?")
    ),
    "wrong type": Case(flags=("--network_dim", "abc"), says=("--network_dim must be a whole number, got 'abc'",)),
    "not a number": Case(flags=("--learning_rate", "nan"), says=("--learning_rate must be a finite number",)),
    "rank 0": Case(flags=("--network_dim", "0"), says=("--network_dim must be at least 1, got 0",)),
    "rank beyond any layer": Case(
        flags=("--network_dim", "99999999999"), says=("--network_dim 99999999999 is more than", "5120 is the most")
    ),
    "decimal comma": Case(
        flags=("--learning_rate", "1,5e-4"), says=("--learning_rate must be a number, got '1,5e-4'",)
    ),
    "image to video": Case(
        flags=("--task", "i2v-14B"), says=("--task i2v-14B: Wan2.1 image to video needs", "t2v-14B")
    ),
    "two experts": Case(flags=("--dit_high_noise", "high.safetensors"), says=("--dit_high_noise", "train one")),
    "schedule of a measured loss": Case(
        flags=("--lr_scheduler", "reduce_lr_on_plateau"), says=("follows a measured loss", "choose from constant")
    ),
    "task of two experts": Case(
        flags=("--task", "t2v-A14B"), says=("Wan2.2 text to video trains two experts", "choose from t2v-1.3B")
    ),
    "one frame": Case(flags=("--one_frame",), says=("--one_frame", "remove the flag")),
    "upload": Case(
        flags=("--huggingface_repo_id", "me/style"), says=("--huggingface_repo_id", "upload the saved files")
    ),
    "persistent workers without workers": Case(
        flags=("--persistent_data_loader_workers",), says=("--max_data_loader_n_workers of at least 1",)
    ),
    "minimum above maximum": Case(
        flags=("--min_timestep", "900", "--max_timestep", "100"),
        says=("--min_timestep must be below --max_timestep, got 900 and 100",),
    ),
    "folder in the name": Case(
        flags=("--output_name", "runs/style"), says=("--output_name 'runs/style' is no file name", "--output_dir")
    ),
    "name that Windows refuses": Case(flags=("--output_name", "style:1"), says=("--output_name 'style:1'",)),
    "previews without prompts": Case(
        flags=("--sample_every_n_epochs", "1"), says=("--sample_every_n_epochs", "add --sample_prompts")
    ),
    "previews without models": Case(
        flags=("--sample_prompts", "prompts.txt", "--sample_at_first"),
        says=("previews need --vae", "previews need --t5"),
    ),
    "tensorboard without a folder": Case(flags=("--log_with", "tensorboard"), says=("for example --logging_dir logs",)),
}
LEARNING = {
    "warmup of a constant rate": Case(
        flags=("--lr_warmup_steps", "10"), says=("--lr_warmup_steps", "type --lr_scheduler constant_with_warmup")
    ),
    "warmup above 100 %": Case(
        flags=("--lr_scheduler", "cosine", "--lr_warmup_steps", "150%"),
        says=("--lr_warmup_steps must be a whole number of steps or a share from 0 to 1",),
    ),
    "unknown schedule": Case(flags=("--lr_scheduler", "cosin"), says=("--lr_scheduler", "did you mean 'cosine'?")),
    "rules of a schedule": Case(
        flags=("--lr_scheduler", "piecewise_constant", "--lr_scheduler_args", "step_rules=1:ten,0.1"),
        says=("step_rules='1:ten,0.1'", "should look like 1:1000,0.1:2000,0.01"),
    ),
    "argument of rex": Case(
        flags=("--lr_scheduler", "rex", "--lr_scheduler_args", "rex_alpha=small"),
        says=("--lr_scheduler_args rex_alpha must be a number above 0, got 'small'",),
    ),
    "unknown argument of rex": Case(
        flags=("--lr_scheduler", "rex", "--lr_scheduler_args", "rex_alfa=1"), says=("did you mean 'rex_alpha'?",)
    ),
    "scheduler class that does not exist": Case(
        flags=("--lr_scheduler_type", "torch.optim.lr_scheduler.StepLRR"),
        says=("--lr_scheduler_type torch.optim.lr_scheduler.StepLRR", "StepLRR"),
    ),
    "scheduler class that misses an argument": Case(
        flags=("--lr_scheduler_type", "torch.optim.lr_scheduler.StepLR"),
        says=("--lr_scheduler_type", "step_size", "check the name and --lr_scheduler_args"),
    ),
    "scheduler class that wants a loss": Case(
        flags=("--lr_scheduler_type", "torch.optim.lr_scheduler.ReduceLROnPlateau"),
        says=("ReduceLROnPlateau cannot be used", "metrics"),
    ),
    "optimizer of sparse gradients": Case(
        flags=("--optimizer_type", "SparseAdam"), says=("unknown --optimizer_type 'SparseAdam'", "known: adamw")
    ),
    "optimizer that evaluates the loss again": Case(
        flags=("--optimizer_type", "LBFGS"), says=("--optimizer_type LBFGS evaluates the loss", "use adamw8bit")
    ),
    "unknown optimizer": Case(flags=("--optimizer_type", "adamw9bit"), says=("did you mean 'adamw8bit'?",)),
    "unknown class of torch": Case(flags=("--optimizer_type", "AdamX"), says=("'AdamX'", "or the dotted path")),
    "optimizer of a package that is not installed": Case(
        flags=("--optimizer_type", "came_optimizer.CAME"),
        says=("--optimizer_type came_optimizer.CAME cannot be imported", "pip install came_optimizer"),
    ),
    "optimizer without its argument": Case(
        flags=("--optimizer_args", "weight_decy=0.1"), says=("adamw refuses its arguments", "weight_decy=0.1")
    ),
    "optimizer argument out of range": Case(
        flags=("--optimizer_args", "betas=2,0.99"), says=("adamw refuses its arguments", "betas")
    ),
    "optimizer argument of a wrong type": Case(
        flags=("--optimizer_args", "betas=high"),
        says=("adamw refuses its arguments", "check --optimizer_args betas=high"),
    ),
    "optimizer argument without a value": Case(
        flags=("--optimizer_args", "weight_decay"), says=("--optimizer_args: 'weight_decay' is not key=value",)
    ),
    "unknown network argument": Case(
        flags=("--network_args", "rank_droput=0.1"),
        says=("--network_args: unknown key", "did you mean 'rank_dropout'?"),
    ),
    "pattern that matches nothing": Case(
        flags=("--network_args", "include_patterns=['.*self_atn.*']"),
        says=("include_patterns: '.*self_atn.*' matches no module", "Near it: 'self_attn."),
    ),
    "pattern that is none": Case(
        flags=("--network_args", "exclude_patterns=['(q']"),
        says=("exclude_patterns: '(q' is not a regular expression",),
    ),
    "everything excluded": Case(
        flags=("--network_args", "exclude_patterns=['.*']"), says=("leave no module to train", "give include_patterns")
    ),
    "module of another trainer": Case(
        flags=("--network_module", "networks.lora"), says=("--network_module networks.lora", "use networks.lora_wan")
    ),
    "a path for a module": Case(
        flags=("--network_module", ".."), says=("--network_module ..", "use networks.lora_wan")
    ),
    "more multipliers than files": Case(
        flags=("--base_weights_multiplier", "1", "0.5"), says=("has 2 values for 0 --base_weights",)
    ),
    "rank from nowhere": Case(flags=("--dim_from_weights",), says=("--dim_from_weights needs --network_weights",)),
}
MACHINE = {
    "more blocks than there are": Case(
        flags=("--blocks_to_swap", "30"), says=("this model has 2", "give --blocks_to_swap a number from 0 to 2")
    ),
    "fp16 on a CPU": Case(
        flags=("--mixed_precision", "fp16"), says=("--mixed_precision fp16 needs a CUDA card", "bf16")
    ),
    "a card that is not there": Case(flags=("--device", "cuda:63"), says=("--device cuda:63", "type --device cpu")),
    "no such device": Case(flags=("--device", "gpu"), says=("--device gpu", "type cuda, cuda:1 or cpu")),
    "kernel that is not installed": Case(flags=("--no_sdpa", "--flash3"), says=("flash3", "--sdpa")),
    "tracker that is not installed": Case(flags=("--log_with", "wandb"), says=("pip install wandb",)),
    "output_dir is a file": Case(
        flags=("--output_dir", "prompts.txt"), says=("--output_dir prompts.txt", "is a file; choose another folder")
    ),
    "output_dir in a file": Case(flags=("--output_dir", "prompts.txt/output"), says=("prompts.txt is a file",)),
    "logging_dir is a file": Case(
        flags=("--logging_dir", "prompts.txt"), says=("--logging_dir prompts.txt", "is a file; choose another folder")
    ),
    "settings of the tracker": Case(
        flags=("--log_tracker_config", "run.toml", "--logging_dir", "logs"),
        spoil=config_file("[tensorboard", "x = 1"),
        says=("--log_tracker_config run.toml", "line 1"),
    ),
}
CONFIG_FILES = {
    "missing": Case(flags=("--config_file", "rum"), says=("rum.toml", "there is no such file")),
    "unknown key": Case(
        spoil=config_file("[optimizer]", "lerning_rate = 1e-4"),
        flags=("--config_file", "run"),
        says=("run.toml line 2: lerning_rate: unknown key", "did you mean 'learning_rate'?"),
    ),
    "wrong type": Case(
        spoil=config_file('network_alpha = "16"'),
        flags=("--config_file", "run.toml"),
        says=("run.toml line 1: network_alpha must be a number", "write it without quotes"),
    ),
    "wrong choice": Case(
        spoil=config_file('weighting_scheme = "bogus"'),
        flags=("--config_file", "run.toml"),
        says=("run.toml line 1: weighting_scheme must be one of none",),
    ),
    "key of a dataset": Case(
        spoil=config_file("num_repeats = 2"),
        flags=("--config_file", "run.toml"),
        says=("run.toml line 1: num_repeats: belongs in the dataset file",),
    ),
    "syntax": Case(
        spoil=config_file('output_dir = "C:\\runs"'),
        flags=("--config_file", "run.toml"),
        says=("run.toml line 1", "a backslash inside double quotes"),
    ),
}
PROMPTS = {
    "unknown option": Case(
        spoil=prompts("# one", "A red circle --w 32 --h 32 --steps 4"),
        says=("prompts.txt line 2: unknown option --steps", "did you mean --s?"),
    ),
    "value that is no number": Case(
        spoil=prompts("A red circle --w wide"), says=("prompts.txt line 1: --w (width) must be a whole number",)
    ),
    "every line at fault": Case(
        spoil=prompts("A --d -1", "", "--w 32", "B --s"),
        says=(
            "3 problems",
            "line 1: --d (seed)",
            "line 3: there is no prompt text",
            "line 4: --s (sample_steps) needs",
        ),
    ),
    "nothing in it": Case(spoil=prompts("# nothing"), says=("prompts.txt: holds no prompt",)),
    "another format": Case(
        spoil=prompts("A", name="prompts.csv"),
        flags=("--sample_prompts", "prompts.csv"),
        says=("prompts.csv", "must be .txt, .toml or .json"),
    ),
    "wrong key in TOML": Case(
        spoil=prompts("[prompt]", "widht = 32", "[[prompt.subset]]", 'prompt = "A"', name="prompts.toml"),
        flags=("--sample_prompts", "prompts.toml"),
        says=("prompts.toml line 2: unknown key 'widht'", "did you mean 'width'?"),
    ),
    "JSON that is cut off": Case(
        spoil=prompts('[{"prompt": "A"},', name="prompts.json"),
        flags=("--sample_prompts", "prompts.json"),
        says=("prompts.json line 2",),
    ),
    "missing": Case(flags=("--sample_prompts", "sampling.txt"), says=("--sample_prompts: there is no sampling.txt",)),
}


@parametrised(FLAGS)
def test_flags(bench: Bench, case: Case) -> None:
    check(bench, TRAINING, TRAIN, case)


@parametrised(LEARNING)
def test_what_learns(bench: Bench, case: Case) -> None:
    check(bench, TRAINING, TRAIN, case)


@parametrised(MACHINE)
def test_what_the_machine_lacks(bench: Bench, case: Case) -> None:
    check(bench, TRAINING, TRAIN, case)


@parametrised(CONFIG_FILES)
def test_config_files(bench: Bench, case: Case) -> None:
    check(bench, TRAINING, TRAIN, case)


@parametrised(PROMPTS)
def test_prompt_files(bench: Bench, case: Case) -> None:
    check(bench, TRAINING, (*TRAIN, *PREVIEWS), case)


def test_what_is_wrong_with_flags_is_listed_whole(bench: Bench) -> None:
    flags: tuple[str, ...] = (
        *TRAIN,
        "--learning_rate",
        "fast",
        "--networkdim",
        "8",
        "--lr_warmup_steps",
        "5",
        "--task",
        "i2v-14B",
    )
    flags += ("--t5", "t6.pth")
    says = (
        "5 problems:",
        "--t5: there is no t6.pth (did you mean 't5.pth'?)",
        "did you mean '--network_dim'?",
        "--learning_rate must be",
        "--lr_warmup_steps",
        "--task i2v",
    )
    bench.refuses(TRAINING, flags, says)


def test_what_is_wrong_with_files_and_settings_is_listed_whole(bench: Bench) -> None:
    (bench.folder / "cache_videos" / "green_wan_te.safetensors").unlink()
    bench.write("prompts.txt", "A circle --size 32\n")
    flags: tuple[str, ...] = (
        *TRAIN,
        *PREVIEWS,
        "--dit",
        "dti.safetensors",
        "--vae",
        "t5.pth",
        "--mixed_precision",
        "fp16",
    )
    flags += ("--optimizer_args", "betas=2", "--logging_dir", "prompts.txt")
    says = (
        *("7 problems:", "--dit: there is no dti.safetensors (did you mean 'dit.safetensors'?)"),
        *("green_wan_te.safetensors is missing", "--vae t5.pth is the UMT5 text encoder", "unknown option --size"),
        *("--optimizer_args betas=2", "prompts.txt is a file", "fp16 needs a CUDA card"),
    )
    bench.refuses(TRAINING, flags, says)


def test_caching_flags(bench: Bench) -> None:
    flags = (*LATENTS, "--i2v", "--vae_dtype", "fp8", "--batch_size", "0", "--num_wrokers", "2")
    says = (
        "4 problems:",
        "did you mean '--num_workers'?",
        "--i2v",
        "--vae_dtype must be one of",
        "--batch_size must be at least 1",
    )
    bench.refuses(CACHING, flags, says)


@pytest.mark.parametrize(
    ("out", "says"),
    [
        ("prompts.txt", "is a file; name a folder"),
        ("prompts.txt/below", "is a file; name a folder"),
        ("images", "holds files that the quickstart did not"),
    ],
)
def test_the_quickstart_writes_into_no_folder_of_others(bench: Bench, out: str, says: str) -> None:
    bench.refuses(wanlora_main, ("quickstart", "--out", out), (f"--out {out}", says))


def test_the_process_ends_with_code_2_and_no_traceback(bench: Bench, pytestconfig: pytest.Config) -> None:
    command = [sys.executable, str(pytestconfig.rootpath / "wan_train_network.py"), "--nonsense"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(pytestconfig.rootpath / "src")},
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: unknown flag --nonsense")
    assert "Traceback" not in done.stderr
