"""When previews are drawn, and that they give back everything they borrow."""

import gc
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import schedulefree
import torch
from torch import Tensor, nn

from tests.unit.training.parts import engine
from wanlora.config.outputs import PreviewConfig
from wanlora.foundation.shapes import PixelShape
from wanlora.generation.requests import PreviewRequest
from wanlora.training.position import Position
from wanlora.training.previews import PreviewMaterials, Previews


class Model(nn.Module):
    """Answers its own trained number; fails on texts of ones."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1,), 0.1))
        self.frozen = nn.Dropout(0.5).eval()
        self.attention = "sdpa"
        self.seen: list[tuple[str, bool, bool]] = []
        self.tensors: list[weakref.ref[Tensor]] = []

    def forward(self, x_BCFHW: Tensor, timestep_B: Tensor, text: list[Tensor]) -> Tensor:
        self.seen.append((self.attention, self.training, torch.is_grad_enabled()))
        self.tensors.append(weakref.ref(x_BCFHW))
        if bool((text[0] == 1).all()):
            raise AssertionError("this text is not liked")
        return x_BCFHW * self.weight


class Decoder(nn.Module):
    """One grey level for every latent cell."""

    def decode(self, latents_BCFHW: Tensor) -> Tensor:
        return latents_BCFHW[:, :3].clamp(-1, 1).repeat_interleave(8, 3).repeat_interleave(8, 4)


def request(prompt: str) -> PreviewRequest:
    return PreviewRequest(
        prompt=prompt,
        negative_prompt=None,
        pixels=PixelShape(32, 16),
        seed=5,
        steps=2,
        shift=3.0,
        guidance=1.0,
        fps=16,
        where="prompts.txt:1",
    )


def previews(folder: Path, *prompts: str, optimizer: Any = None, **settings: Any) -> tuple[Previews, Model]:
    model: Any = Model()
    resets: list[str] = []
    stream: Any = SimpleNamespace(reset=lambda: resets.append("reset"), resets=resets)
    trainee: Any = SimpleNamespace(model=model, stream=stream)
    texts = {prompt: torch.full((2, 4), 1.0 if prompt == "bad" else 0.5) for prompt in prompts}
    vae: Any = Decoder()
    made = Previews(
        PreviewConfig(sample_solver="euler", **settings),
        PreviewMaterials(requests=[request(prompt) for prompt in prompts], texts=texts, vae=vae),
        trainee,
        optimizer or torch.optim.SGD(model.parameters(), lr=0.1),
        engine(),
        output_dir=folder,
        output_name="style",
        kernel="reference",
    )
    return made, model


def drawn(folder: Path) -> list[str]:
    """Moment and number of every preview."""
    return sorted("_".join(path.name.split("_")[1:3]) for path in (folder / "sample").glob("*.png"))


def test_steps_and_epochs_fall_due_and_are_drawn_once_together(tmp_path: Path) -> None:
    made, _ = previews(tmp_path, "a", sample_every_n_steps=2, sample_every_n_epochs=2, sample_at_first=True)
    made.at_first(Position())
    for step in range(1, 9):
        made.when_due(Position(step=step, epoch=step // 4), epoch_ended=step % 4 == 0)
    assert drawn(tmp_path) == ["000000_00", "000002_00", "000004_00", "000006_00", "e000002_00"]


@pytest.mark.parametrize(("settings", "step"), [({"sample_at_first": True}, 7), ({}, 0)])
def test_nothing_is_drawn_first_in_a_resumed_run_or_unasked(
    tmp_path: Path, settings: dict[str, bool], step: int
) -> None:
    made, model = previews(tmp_path, "a", **settings)
    made.at_first(Position(step=step))
    made.when_due(Position(step=step + 1), epoch_ended=True)
    assert model.seen == []


def test_a_prompt_that_fails_is_left_out(tmp_path: Path) -> None:
    made, model = previews(tmp_path, "bad", "good", sample_every_n_steps=1)
    made.when_due(Position(step=1), epoch_ended=False)
    assert drawn(tmp_path) == ["000001_01"]
    assert made.trainee.stream is not None
    assert made.trainee.stream.resets == ["reset"]  # type: ignore[attr-defined]
    assert (model.attention, model.training, model.frozen.training) == ("sdpa", True, False)


def test_everything_borrowed_is_given_back(tmp_path: Path) -> None:
    model_weight = nn.Parameter(torch.ones(1))
    optimizer = schedulefree.AdamWScheduleFree([model_weight])
    optimizer.train()
    made, model = previews(tmp_path, "a", optimizer=optimizer, sample_every_n_steps=1)
    before = torch.get_rng_state()
    weight = model.weight.detach().clone()
    made.when_due(Position(step=1), epoch_ended=False)
    assert set(model.seen) == {("reference", False, False)}
    assert (model.attention, model.training, model.frozen.training) == ("sdpa", True, False)
    assert optimizer.param_groups[0]["train_mode"]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(model.weight, weight)
    assert model.weight.grad is None


def test_no_tensor_of_a_preview_outlives_it(tmp_path: Path) -> None:
    made, model = previews(tmp_path, "bad", "good", sample_every_n_steps=1)
    made.when_due(Position(step=1), epoch_ended=False)
    gc.collect()
    assert len(model.tensors) == 3
    assert [reference() for reference in model.tensors] == [None] * 3


def test_the_same_seed_gives_the_same_preview(tmp_path: Path) -> None:
    contents = []
    for folder in ("one", "two"):
        made, _ = previews(tmp_path / folder, "a", sample_every_n_steps=1)
        made.when_due(Position(step=1), epoch_ended=False)
        contents.append(next((tmp_path / folder / "sample").iterdir()).read_bytes())
    assert contents[0] == contents[1]
