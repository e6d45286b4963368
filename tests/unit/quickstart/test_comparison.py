"""The comparison draws what it says it draws, measures it, and shows it in one page and one picture."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tiny import TinyDataset, TinyWan
from wanlora.config.prompts import read_prompts
from wanlora.foundation.shapes import PixelShape
from wanlora.generation.requests import resolve_all
from wanlora.lora.files import save_lora
from wanlora.lora.network import inject
from wanlora.lora.targets import candidates
from wanlora.models.wan.checkpoint import load_transformer
from wanlora.models.wan.spec import TASKS
from wanlora.quickstart.comparison import Comparison, compare, dataset_clips
from wanlora.quickstart.page import write_page
from wanlora.quickstart.sheet import trail, write_sheet
from wanlora.quickstart.verdict import Measure, measures, verdict
from wanlora.quickstart.world import base_scenes, film, new_scenes

CPU = torch.device("cpu")


@pytest.fixture
def lora(tiny_models: TinyWan, tmp_path: Path) -> Path:
    """A LoRA file that changes every module, with alpha other than its rank."""
    model = load_transformer(tiny_models.dit, "t2v-14B", device=CPU, dtype=torch.float32, progress=False)
    generator = torch.Generator().manual_seed(0)
    network = inject(model, candidates(model), rank=2, alpha=1.0, generator=generator)
    for adapter in network.adapters.values():
        adapter.lora_up.weight.data.normal_(generator=generator)
    save_lora(tmp_path / "a.safetensors", network)
    return tmp_path / "a.safetensors"


def test_the_lora_changes_what_is_drawn_and_off_it_changes_nothing(
    tiny_models: TinyWan, tiny_dataset: TinyDataset, lora: Path
) -> None:
    sizes = "--w 96 --h 64 --f 5 --s 2 --l 1 --d 3"
    tiny_dataset.prompts.write_text(f"A red circle. {sizes}\nA cross. {sizes.replace('5', '1')}\n", encoding="utf-8")
    toml = tiny_dataset.toml
    shorter = re.sub(r"(?m)^(target_frames = .*)\b21\b", r"\g<1>5", toml.read_text(encoding="utf-8"))
    toml.write_text(shorter, encoding="utf-8")
    comparison = compare(
        tiny_models, {"half": lora, "end": lora}, prompts=tiny_dataset.prompts, dataset=toml, device=CPU
    )
    assert [frames.shape for frames in comparison.base] == [(5, 64, 96, 3), (1, 64, 96, 3)]
    assert [frames.shape for frames in comparison.dataset] == [(5, 64, 96, 3), (1, 64, 96, 3)]
    assert comparison.off_equals_base
    assert list(comparison.lora) == ["half", "end"]
    for base, drawn, again in zip(comparison.base, comparison.trained, comparison.lora["half"], strict=True):
        assert not np.array_equal(base, drawn)
        assert np.array_equal(drawn, again)


def test_clips_of_the_dataset_are_what_is_encoded_and_differ(tiny_dataset: TinyDataset) -> None:
    size = PixelShape(96, 64, 21)
    first, second = dataset_clips(tiny_dataset.toml, [size, size])
    assert not np.array_equal(first, second)
    expected = film(new_scenes(12, 1)[0], 21, 96, 64)
    assert abs(first.astype(int) - expected).mean() < 6


@pytest.fixture
def half_learned() -> Comparison:
    """Of two clips and a picture, the LoRA draws one clip and the picture as the dataset shows them."""
    old = [film(scene, frames, 96, 64) for scene, frames in zip(base_scenes(3, 1), (21, 21, 1), strict=True)]
    new = [film(scene, frames, 96, 64) for scene, frames in zip(new_scenes(3, 1), (21, 21, 1), strict=True)]
    prompts: Any = [
        SimpleNamespace(prompt=f"prompt <{n}>", fps=16, pixels=PixelShape(96, 64, f)) for n, f in enumerate((21, 21, 1))
    ]
    mixed = [old[0], new[1], new[2]]
    return Comparison(requests=prompts, base=old, lora={"at the end": mixed}, off=old, dataset=new)


def test_look_is_measured_on_everything_and_motion_on_clips(half_learned: Comparison) -> None:
    look, motion = measures(half_learned)
    assert look.closed == pytest.approx(2 / 3, abs=0.1)
    assert motion.closed == pytest.approx(1 / 2, abs=0.15)
    assert look.base < 0.2 < 0.9 < look.dataset


def test_the_words_hold_the_numbers_and_what_the_base_said(half_learned: Comparison) -> None:
    assert str(Measure(name="look", base=0.1, dataset=0.9, lora=0.7)).endswith(
        "base 0.10, dataset 0.90, LoRA 0.70: closed 75% of the distance"
    )
    assert verdict(half_learned)[2] == "LoRA off again: all 3 are the base's again, bit for bit"


def test_a_single_other_pixel_is_not_the_base_again(half_learned: Comparison) -> None:
    changed = [clip.copy() for clip in half_learned.off]
    changed[2][0, 5, 5, 0] ^= 1
    comparison = Comparison(
        requests=half_learned.requests,
        base=half_learned.base,
        lora=half_learned.lora,
        off=changed,
        dataset=half_learned.dataset,
    )
    assert "NOT" in verdict(comparison)[2]


def test_the_page_needs_nothing_but_itself(half_learned: Comparison, tmp_path: Path) -> None:
    steps = tmp_path / "steps.jsonl"
    steps.write_text(
        '{"step": 1, "loss": 0.5}\n{"step": 1, "loss/validation": 0.4}\n{"step": 2, "loss": 0.3}\n', encoding="utf-8"
    )
    write_page(tmp_path / "index.html", half_learned, ["a < b"], steps)
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert len(sources) == 12
    assert all(source.startswith(("data:video/mp4;base64,", "data:image/png;base64,")) for source in sources)
    assert "http" not in page and "url(" not in page
    assert "a &lt; b" in page and "prompt &lt;0&gt;" in page
    assert "0.400 at step 1" in page


def test_the_sheet_shows_every_clip(half_learned: Comparison, tmp_path: Path) -> None:
    write_sheet(tmp_path / "sheet.png", half_learned, ["words"])
    with Image.open(tmp_path / "sheet.png") as image:
        sheet = np.asarray(image.convert("RGB")).astype(int)
    for clip in (half_learned.base[0][0], half_learned.trained[1][20], half_learned.dataset[2][0]):
        windows = np.lib.stride_tricks.sliding_window_view(sheet[..., 0], (64, 96))[::1, ::1]
        corners = windows[:, :, 0, 0] == clip[0, 0, 0]
        found = any(np.array_equal(sheet[y : y + 64, x : x + 96], clip) for y, x in np.argwhere(corners))
        assert found


def test_every_prompt_of_the_dataset_is_read(tiny_dataset: TinyDataset) -> None:
    requests = resolve_all(read_prompts(tiny_dataset.prompts), TASKS["t2v-14B"])
    assert [request.pixels.frames for request in requests] == [21, 21, 21, 21, 45, 1]
    assert len({request.prompt for request in requests}) == 6


def test_a_trail_shows_where_the_shape_was_the_earlier_the_paler() -> None:
    frames = np.full((21, 20, 60, 3), 200, np.uint8)
    for index in range(21):
        frames[index, 8:12, 2 * index : 2 * index + 4] = 0
    left, middle, right = (int(trail(frames)[10, x, 0]) for x in (1, 21, 42))
    assert 200 > left > middle > right == 0
    assert (trail(frames)[0] == 200).all()
