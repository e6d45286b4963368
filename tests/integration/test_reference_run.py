"""The reference run as users type it: the three scripts, every flag, file names and all, through `accelerate launch`.

The files of those names hold the tiny Wan; only the number of epochs, given once more at the end, is smaller.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import TrainingFolder
from wanlora.lora.files import read_file
from wanlora.training.metrics import read_steps

ROOT = Path(__file__).parents[2]
LATENTS = "wan_cache_latents.py --dataset_config style.toml --vae wan_2.1_vae.safetensors"
TEXT = (
    "wan_cache_text_encoder_outputs.py --dataset_config style.toml --t5 models_t5_umt5-xxl-enc-bf16.pth --batch_size 16"
)
TRAIN = """
-m accelerate.commands.launch --num_cpu_threads_per_process 1 --mixed_precision bf16 wan_train_network.py
--task t2v-14B --dit wan2.1_t2v_14B_bf16.safetensors --vae wan_2.1_vae.safetensors --t5 models_t5_umt5-xxl-enc-bf16.pth
--sdpa --blocks_to_swap 10 --mixed_precision bf16 --fp8_base --fp8_scaled --fp8_t5
--dataset_config style.toml --optimizer_type adamw8bit --learning_rate 5e-5 --gradient_checkpointing
--max_data_loader_n_workers 2 --persistent_data_loader_workers
--network_module networks.lora_wan --network_dim 32 --network_alpha 32
--timestep_sampling shift --discrete_flow_shift 3.0 --save_every_n_epochs 1 --seed 2025
--output_dir output --output_name style_v01 --log_config --log_with tensorboard --logging_dir logs
--sample_prompts sampling.txt --save_state --max_train_epochs 50 --sample_every_n_epochs 1
"""
PROMPTS = "# prompt 1\nStudio style. A red circle is walking on the beach.  --w 32 --h 32 --f 5 --d 7 --s 2\n"


@pytest.fixture
def folder(training_folder: TrainingFolder) -> Path:
    """What lies around a user who types the three commands: scripts, models under their released names, data."""
    here, models = training_folder.folder, training_folder.models
    for script in ROOT.glob("wan_*.py"):
        shutil.copy(script, here)
    (here / "dataset.toml").rename(here / "style.toml")
    shutil.copy(models.dit, here / "wan2.1_t2v_14B_bf16.safetensors")
    shutil.copy(models.vae, here / "wan_2.1_vae.safetensors")
    shutil.copy(models.t5, here / "models_t5_umt5-xxl-enc-bf16.pth")
    shutil.copytree(models.tokenizer.parent, here / "google" / "umt5-xxl")
    (here / "sampling.txt").write_text(PROMPTS, encoding="utf-8")
    return here


def python(command: str, folder: Path) -> str:
    """Run a command line in the user's folder; what it printed."""
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    done = subprocess.run(
        [sys.executable, *shlex.split(command)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_the_three_steps_as_typed(folder: Path) -> None:
    assert "encode 9 of 9 latents: 9 stale" in python(LATENTS, folder)  # the caches there hold noise
    assert "encode 6 of 6 captions: 6 stale" in python(TEXT, folder)
    said = python(f"{TRAIN} --max_train_epochs 2", folder)
    assert "--blocks_to_swap 10: without a CUDA card" in said
    output = folder / "output"
    assert len(read_steps(output / "style_v01-steps.jsonl")) == 16
    for name in ("style_v01-000001", "style_v01"):
        assert len(read_file(output / f"{name}.safetensors").loras) == 120
        assert (output / f"{name}-state" / "run.json").is_file()
    assert len(list((output / "sample").glob("style_v01_e00000?_00_*_7.mp4"))) == 2
    assert list((folder / "logs").rglob("events.out.tfevents.*"))
