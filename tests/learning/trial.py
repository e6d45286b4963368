"""A short training by the real programs, and what must come of it.

`python -m tests.learning.trial` trains without any fault, prints what the evaluator finds, and records it in
`tests/golden/learning.json`; to be run when the shipped weights or the trial change, and only then.
"""

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev

import toml

from tests.learning.evaluator import FRAMES, HEIGHT, WIDTH, Evaluator, Files, plain_scenes
from wanlora.cli import cache_latents, cache_text_encoder_outputs, train_network
from wanlora.quickstart.media import write_clip
from wanlora.quickstart.shipped import PRETRAINED

GOLDEN = Path(__file__).parents[1] / "golden" / "learning.json"
SEEDS = (1, 2, 3)
STEPS = 30
_NUM_CLIPS, _SCENE_SEED = 12, 5
_RANK, _ALPHA, _RATE = 8, 1, 1e-2
_T_95 = 4.303
"""Student's t for three values, two-sided."""

FILES = Files(dit=PRETRAINED.dit, vae=PRETRAINED.vae, t5=PRETRAINED.t5, tokenizer=PRETRAINED.tokenizer)
Main = Callable[[Sequence[str]], int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Golden:
    """What was found when the weights were shipped."""

    base_loss: float
    margin: float
    """By how much the loss must fall: four fifths of what it fell by."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """The folder of one set of trainings."""

    folder: Path
    flags: tuple[str, ...] = field(default=())

    @property
    def toml(self) -> Path:
        """The dataset file."""
        return self.folder / "dataset.toml"

    def cache(self) -> None:
        """Write clips and captions and cache them with the real programs."""
        clips = self.folder / "clips"
        for number, scene in enumerate(plain_scenes(_NUM_CLIPS, _SCENE_SEED)):
            write_clip(clips / f"{number}.mp4", scene, frames=FRAMES, width=2 * WIDTH, height=2 * HEIGHT)
            (clips / f"{number}.txt").write_text(scene.caption, encoding="utf-8")
        table = {"video_directory": clips.as_posix(), "resolution": [WIDTH, HEIGHT], "target_frames": [FRAMES]}
        self.toml.write_text(toml.dumps({"datasets": [table | {"batch_size": 2}]}), encoding="utf-8")
        dataset = ("--dataset_config", str(self.toml), "--device", "cpu")
        _run(cache_latents.main, (*dataset, "--vae", str(FILES.vae)))
        _run(cache_text_encoder_outputs.main, (*dataset, "--t5", str(FILES.t5)))

    def train(self, seed: int) -> Path:
        """Train for some steps; the LoRA file."""
        output = self.folder / f"seed_{seed}"
        flags = f"--task t2v-14B --sdpa --mixed_precision bf16 --fp8_base --fp8_scaled --seed {seed} --device cpu"
        flags += f" --max_train_steps {STEPS} --optimizer_type adamw --learning_rate {_RATE}"
        flags += f" --network_module networks.lora_wan --network_dim {_RANK} --network_alpha {_ALPHA}"
        flags += " --timestep_sampling shift --discrete_flow_shift 3.0 --max_data_loader_n_workers 0 --output_name lora"
        paths = ("--dit", str(FILES.dit), "--dataset_config", str(self.toml), "--output_dir", str(output))
        _run(train_network.main, (*flags.split(), *paths))
        return output / "lora.safetensors"


def require_learning(base: float, losses: Sequence[float], golden: Golden) -> None:
    """Raise `AssertionError` unless the base is as recorded and the loss is lower by more than the margin.

    With 95 % confidence over the seeds, that is: the whole interval of the fall lies above the margin.
    """
    assert abs(base / golden.base_loss - 1) <= 0.02, f"the base's loss is {base:.5f}, recorded {golden.base_loss:.5f}"
    falls = [base - loss for loss in losses]
    low = mean(falls) - _T_95 * stdev(falls) / len(falls) ** 0.5
    assert low > golden.margin, f"the loss falls by {falls}, at least {low:.5f}; it must by {golden.margin:.5f}"


def read_golden() -> Golden:
    """What is recorded."""
    return Golden(**json.loads(GOLDEN.read_text(encoding="utf-8")))


def _run(main: Main, flags: Sequence[str]) -> None:
    assert main(flags) == 0, " ".join(flags)


def record() -> None:
    """Train without a fault and write down what comes of it."""
    evaluator = Evaluator(FILES)
    base = evaluator.loss()
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(folder=Path(folder))
        trial.cache()
        falls = [base - evaluator.loss(trial.train(seed)) for seed in SEEDS]
    margin = 0.8 * mean(falls)
    print(f"base {base:.5f}; it falls by {falls}; margin {margin:.5f}")
    GOLDEN.write_text(json.dumps({"base_loss": base, "margin": margin}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    record()
