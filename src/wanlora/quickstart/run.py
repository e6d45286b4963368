"""`wanlora quickstart`: a LoRA learns a look and a motion, on whatever machine this is, for everyone to see.

A tiny Wan is shipped with the package. It draws moving shapes. The quickstart gives it clips of a look and a
motion that it does not know, runs the three real programs on them as processes of their own, and then draws the same
prompts and seeds without and with the LoRA: one page, one picture, and the distance closed, measured on the pixels.
Nothing is simulated: files are in the official formats, the commands are those that train a real LoRA. Each call trains
in a new `run_N`; models, clips and caches are kept between calls.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from wanlora.foundation.devices import find_device
from wanlora.foundation.errors import ConfigError
from wanlora.foundation.files import write_json, write_text
from wanlora.foundation.log import log
from wanlora.quickstart.comparison import Comparison, compare
from wanlora.quickstart.dataset import TinyDataset, make_tiny_dataset
from wanlora.quickstart.page import write_page
from wanlora.quickstart.sheet import write_sheet
from wanlora.quickstart.shipped import copy_pretrained
from wanlora.quickstart.tiny_model import TinyWan
from wanlora.quickstart.verdict import Measure, measures, verdict

MARKER = ".wanlora-quickstart"
"""The file that tells a folder of ours from somebody else's."""
_NAME = "comic_flies"


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How the LoRA is trained."""

    steps: int = 300
    """Updates."""
    learning_rate: float = 5e-3
    """The optimizer's rate at the start; it falls in the last third."""
    rank: int = 16
    """Of the updates; alpha is the same."""
    seed: int = 2025
    """Of everything random in the run."""
    save_memory: bool = False
    """Recompute and swap blocks, as a large model on a card would."""

    @classmethod
    def for_device(cls, device: torch.device, seed: int) -> "Recipe":
        """More steps where they cost little."""
        on_card = device.type == "cuda"
        return cls(seed=seed, steps=600 if on_card else 300, save_memory=on_card)


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """The folder of one training."""

    folder: Path

    @property
    def output(self) -> Path:
        """LoRA files, states, samples, the step log."""
        return self.folder / "output"

    @property
    def logs(self) -> Path:
        """What TensorBoard shows."""
        return self.folder / "logs"

    @property
    def page(self) -> Path:
        """The comparison as a web page."""
        return self.folder / "index.html"

    @property
    def sheet(self) -> Path:
        """The comparison as a picture."""
        return self.folder / "contact_sheet.png"

    @property
    def measured(self) -> Path:
        """The comparison as numbers."""
        return self.folder / "measures.json"

    @property
    def steps(self) -> Path:
        """One line of JSON per step of the training."""
        return self.output / f"{_NAME}-steps.jsonl"

    @property
    def loras(self) -> dict[str, Path]:
        """The LoRA after the first epoch and at the end."""
        return {
            "after epoch 1": self.output / f"{_NAME}-000001.safetensors",
            "at the end": self.output / f"{_NAME}.safetensors",
        }


def quickstart(out: Path, seed: int = 2025) -> int:
    """Train in `out` and show what was learned; the exit code of the first program that fails, or 0.

    Raises `ConfigError` if `out` holds files of somebody else.
    """
    device = find_device(None)
    return learn(out, Recipe.for_device(device, seed), device)


def learn(out: Path, recipe: Recipe, device: torch.device) -> int:
    """The quickstart with another recipe."""
    _claim(out)
    log.info(f"quickstart in {out.resolve()}: a tiny Wan learns a look and a motion from a few clips")
    models, dataset, run = copy_pretrained(out / "models"), make_tiny_dataset(out / "dataset"), _next_run(out)
    steps = plan(models, dataset, run, recipe)
    for number, step in enumerate(steps, 1):
        log.info(f"\n== {number} of {len(steps) + 1}: {step.title}\n{_shown(step)}\n")
        code = subprocess.run(step.command, env=_environment(), check=False).returncode
        if code:
            log.error(f"the quickstart stops: {step.title} ended with exit code {code}; its own message is above")
            return code
    log.info(f"\n== {len(steps) + 1} of {len(steps) + 1}: the same prompts without and with the LoRA\n")
    words = _show(models, dataset, run, device)
    log.info(_summary(dataset, run, words))
    return 0


def plan(models: TinyWan, dataset: TinyDataset, run: Run, recipe: Recipe) -> tuple[Step, ...]:
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
            flags=(*config, *_training_flags(models, dataset, run, recipe)),
        ),
    )


def _training_flags(models: TinyWan, dataset: TinyDataset, run: Run, recipe: Recipe) -> tuple[str, ...]:
    optimizer = "adamw8bit" if find_spec("bitsandbytes") else "adamw"
    weights = f"--task t2v-14B --dit {_q(models.dit)} --vae {_q(models.vae)} --t5 {_q(models.t5)}"
    maths = "--sdpa --mixed_precision bf16 --fp8_base --fp8_scaled --no_compile"
    memory = "--gradient_checkpointing --blocks_to_swap 3" if recipe.save_memory else ""
    learning = f"--optimizer_type {optimizer} --learning_rate {recipe.learning_rate:g} --seed {recipe.seed}"
    length = f"--max_train_steps {recipe.steps} --lr_scheduler warmup_stable_decay --lr_decay_steps 0.3"
    timesteps = "--timestep_sampling shift --discrete_flow_shift 6.0"
    network = f"--network_module networks.lora_wan --network_dim {recipe.rank} --network_alpha {recipe.rank}"
    loading = "--max_data_loader_n_workers 1 --persistent_data_loader_workers"
    saving = f"--output_dir {_q(run.output)} --output_name {_NAME} --save_every_n_epochs 1 --save_state"
    logs = f"--log_with tensorboard --logging_dir {_q(run.logs)} --log_config"
    samples = f"--sample_prompts {_q(dataset.previews)} --sample_at_first --sample_every_n_epochs 1"
    groups = (weights, maths, memory, learning, length, timesteps, network, loading, saving, logs, samples)
    return tuple(flag for group in groups for flag in shlex.split(group))


def _show(models: TinyWan, dataset: TinyDataset, run: Run, device: torch.device) -> tuple[str, ...]:
    """Draw the comparison and write page, picture and numbers; what they say in words."""
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(_threads())
    comparison = compare(models, run.loras, prompts=dataset.prompts, dataset=dataset.toml, device=device)
    words = verdict(comparison)
    write_page(run.page, comparison, words, run.steps)
    write_sheet(run.sheet, comparison, words)
    write_json(run.measured, _numbers(comparison, measures(comparison)))
    return words


def _numbers(comparison: Comparison, found: Sequence[Measure]) -> dict[str, object]:
    """For programs."""
    by_name = {one.name: {k: getattr(one, k) for k in ("base", "dataset", "lora", "closed")} for one in found}
    return {**by_name, "off_equals_base": comparison.off_equals_base}


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


def _next_run(out: Path) -> Run:
    number = 1
    while (out / f"run_{number}").exists():
        number += 1
    return Run(folder=out / f"run_{number}")


def _environment() -> dict[str, str]:
    """Programs that are started find the modules that this process finds, installed or not.

    They use two threads at most unless the user says otherwise: tensors this small only lose by being shared between
    many cores.
    """
    modules = os.pathsep.join(folder or os.curdir for folder in sys.path)
    return {"OMP_NUM_THREADS": str(_threads())} | os.environ | {"PYTHONPATH": modules}


def _threads() -> int:
    return min(2, os.cpu_count() or 1)


def _shown(step: Step) -> str:
    """The command as one would type it."""
    command = ["python", *step.command[1:]]
    return subprocess.list2cmdline(command) if os.name == "nt" else shlex.join(command)


def _summary(dataset: TinyDataset, run: Run, words: Sequence[str]) -> str:
    learned = "\n".join(f"  {sentence}" for sentence in words)
    return f"""
What the LoRA has learned:
{learned}

  to look at     {run.page.resolve()}
                 {run.sheet.resolve()}
  LoRA           {_listed(run.output, "*.safetensors")}
  samples        {_listed(run.output / "sample", "*.*")}
  logs           {run.logs}   (tensorboard --logdir "{run.logs}")
  dataset TOML   {dataset.toml}
  caches         {_listed_paths(dataset.caches)}

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
