"""`wanlora quickstart`: the three real programs, one after the other, on a model and clips that fit any machine.

Nothing is simulated: the same commands that train a real LoRA run as processes of their own, on files in the official
formats, with the settings of a usual run. Who sees it end well knows that the installation works, and has every file
that a run leaves behind to look at. Each call trains in a new `run_N`; models, clips and caches are kept between calls.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from wanlora.foundation.errors import ConfigError
from wanlora.foundation.files import write_text
from wanlora.foundation.log import log
from wanlora.quickstart.dataset import TinyDataset, make_tiny_dataset
from wanlora.quickstart.tiny_model import TinyWan, make_tiny_wan

MARKER = ".wanlora-quickstart"
"""The file that tells a folder of ours from somebody else's."""
_NAME = "tiny_style"


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One program to run."""

    title: str
    module: str
    flags: tuple[str, ...]

    @property
    def command(self) -> list[str]:
        """What is started."""
        return [sys.executable, "-m", self.module, *self.flags]


def quickstart(out: Path) -> int:
    """Make models and clips in `out`, cache, train and sample; the exit code of the first program that fails, or 0.

    Raises `ConfigError` if `out` holds files of somebody else.
    """
    _claim(out)
    log.info(f"quickstart in {out.resolve()}: a tiny Wan, {_NAME} clips, the three real programs")
    models, dataset, run = make_tiny_wan(out / "models"), make_tiny_dataset(out / "dataset"), _next_run(out)
    steps = plan(models, dataset, run)
    for number, step in enumerate(steps, 1):
        log.info(f"\n== {number} of {len(steps)}: {step.title}\n{_shown(step)}\n")
        code = subprocess.run(step.command, env=_environment(), check=False).returncode
        if code:
            log.error(f"the quickstart stops: {step.title} ended with exit code {code}; its own message is above")
            return code
    log.info(_summary(dataset, run))
    return 0


def plan(models: TinyWan, dataset: TinyDataset, run: Path) -> tuple[Step, ...]:
    """The three programs with the flags of a usual run, scaled down."""
    config = ("--dataset_config", str(dataset.toml))
    return (
        Step(
            title="latents of pictures and clips",
            module="wanlora.cli.cache_latents",
            flags=(*config, "--vae", str(models.vae)),
        ),
        Step(
            title="embeddings of captions",
            module="wanlora.cli.cache_text_encoder_outputs",
            flags=(*config, "--t5", str(models.t5), "--batch_size", "16"),
        ),
        Step(
            title="training with samples",
            module="wanlora.cli.train_network",
            flags=(*config, *_training_flags(models, dataset, run)),
        ),
    )


def _training_flags(models: TinyWan, dataset: TinyDataset, run: Path) -> tuple[str, ...]:
    optimizer = "adamw8bit" if find_spec("bitsandbytes") else "adamw"
    weights = f"--task t2v-14B --dit {_q(models.dit)} --vae {_q(models.vae)} --t5 {_q(models.t5)}"
    memory = "--sdpa --mixed_precision bf16 --fp8_base --fp8_scaled --blocks_to_swap 10 --gradient_checkpointing"
    learning = f"--optimizer_type {optimizer} --learning_rate 1e-3 --max_train_epochs 2 --seed 2025"
    timesteps = "--timestep_sampling shift --discrete_flow_shift 3.0"
    network = "--network_module networks.lora_wan --network_dim 8 --network_alpha 8"
    loading = "--max_data_loader_n_workers 1 --persistent_data_loader_workers"
    saving = f"--output_dir {_q(run / 'output')} --output_name {_NAME} --save_every_n_epochs 1 --save_state"
    logs = f"--log_with tensorboard --logging_dir {_q(run / 'logs')} --log_config"
    samples = f"--sample_prompts {_q(dataset.prompts)} --sample_at_first --sample_every_n_epochs 1"
    groups = (weights, memory, learning, timesteps, network, loading, saving, logs, samples)
    return tuple(flag for group in groups for flag in shlex.split(group))


def _q(path: Path) -> str:
    """A path as one word, whatever spaces and backslashes are in it."""
    return shlex.quote(str(path))


def _claim(out: Path) -> None:
    existing = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    if not existing.is_dir():
        raise ConfigError(f"--out {out}: {existing} is a file; name a folder")
    if out.exists() and any(out.iterdir()) and not (out / MARKER).exists():
        raise ConfigError(f"--out {out} holds files that the quickstart did not make; name a new or an empty folder")
    write_text(out / MARKER, "Made by `wanlora quickstart`, which may write here. The whole folder can be deleted.\n")


def _next_run(out: Path) -> Path:
    number = 1
    while (out / f"run_{number}").exists():
        number += 1
    return out / f"run_{number}"


def _environment() -> dict[str, str]:
    """Programs that are started find the modules that this process finds, installed or not.

    They use one thread each unless the user says otherwise, as under `accelerate launch
    --num_cpu_threads_per_process 1`: tensors this small only lose by being shared between cores.
    """
    modules = os.pathsep.join(folder or os.curdir for folder in sys.path)
    return {"OMP_NUM_THREADS": "1"} | os.environ | {"PYTHONPATH": modules}


def _shown(step: Step) -> str:
    """The command as one would type it."""
    command = ["python", *step.command[1:]]
    return subprocess.list2cmdline(command) if os.name == "nt" else shlex.join(command)


def _summary(dataset: TinyDataset, run: Path) -> str:
    output = run / "output"
    return f"""
The quickstart has run. What it left behind:
  LoRA           {_listed(output, "*.safetensors")}
  samples        {_listed(output / "sample", "*.*")}
  logs           {run / "logs"}   (tensorboard --logdir "{run / "logs"}")
  dataset TOML   {dataset.toml}
  caches         {_listed_paths(dataset.caches)}

The model has random weights, so the samples show noise; loss, files and speed are what there is to see.
The same three steps with a real model, on your own TOML:
{REAL_RUN}"""


REAL_RUN = """\
  python wan_cache_latents.py --dataset_config style.toml --vae wan_2.1_vae.safetensors
  python wan_cache_text_encoder_outputs.py --dataset_config style.toml --t5 models_t5_umt5-xxl-enc-bf16.pth
  accelerate launch --num_cpu_threads_per_process 1 --mixed_precision bf16 wan_train_network.py --task t2v-14B \
--dit wan2.1_t2v_14B_bf16.safetensors --vae wan_2.1_vae.safetensors --t5 models_t5_umt5-xxl-enc-bf16.pth \
--dataset_config style.toml --sdpa --mixed_precision bf16 --fp8_base --fp8_scaled --blocks_to_swap 10 \
--gradient_checkpointing --optimizer_type adamw8bit --learning_rate 5e-5 --max_train_epochs 50 \
--network_module networks.lora_wan --network_dim 32 --network_alpha 32 --timestep_sampling shift \
--discrete_flow_shift 3.0 --max_data_loader_n_workers 2 --persistent_data_loader_workers --seed 2025 \
--save_every_n_epochs 1 --save_state --output_dir output --output_name style_v01"""
"""What to type for a real run."""


def _listed(folder: Path, pattern: str) -> str:
    return _listed_paths(sorted(folder.glob(pattern)))


def _listed_paths(paths: Sequence[Path]) -> str:
    return ("\n" + " " * 17).join(str(path) for path in paths) or "none"
