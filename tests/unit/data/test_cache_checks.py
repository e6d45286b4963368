"""What is missing or stale among the caches is named with its cure; what lies beside them is named and left alone."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.unit.data.clips import make_clip, write_caption
from tests.unit.data.datasets import clips_table, fill_caches, tables
from wanlora.data.checks import check_caches, remarks
from wanlora.data.plan import DataPlan, plan_datasets


@pytest.fixture
def cached(clips: Path, tmp_path: Path) -> DataPlan:
    plan = plan_datasets(tables(clips_table(clips, tmp_path / "cache", target_frames=(1, 5))))
    fill_caches(plan)
    return plan


def test_complete_caches_have_no_problem(cached: DataPlan) -> None:
    assert check_caches(cached) == []
    assert check_caches(cached, vae="vae", vae_dtype="float32") == []
    assert remarks(cached) == []


def test_missing_files_are_counted_and_named_with_the_script_that_makes_them(cached: DataPlan) -> None:
    for item in cached.items[:3]:
        item.latent_path.unlink()
    cached.items[-1].text_path.unlink()
    (latents,) = check_caches(cached, "latents")
    assert latents == (
        f"{cached.items[0].latent_path} is missing, likewise 2 more ({cached.items[1].name}, {cached.items[2].name}); "
        "run wan_cache_latents.py"
    )
    (text,) = check_caches(cached, "text")
    assert text == f"{cached.items[-1].text_path} is missing; run wan_cache_text_encoder_outputs.py"
    assert check_caches(cached) == [latents, text]


def test_caches_of_another_size_are_named_with_both_sizes(cached: DataPlan, clips: Path, tmp_path: Path) -> None:
    config = tables(clips_table(clips, tmp_path / "cache", target_frames=(1, 5), resolution=(96, 80)))
    problems = check_caches(plan_datasets(config))
    assert len(problems) == 1
    assert problems[0].startswith(
        f"{cached.items[0].latent_path} was cached for 64x48, the dataset now asks for 96x80, likewise 5 more"
    )
    assert problems[0].endswith("; run wan_cache_latents.py again")


def test_another_vae_and_a_damaged_file_are_named(cached: DataPlan) -> None:
    cached.items[0].latent_path.write_bytes(b"xx")
    damaged, other = check_caches(cached, "latents", vae="vae 2")
    assert "cannot be read" in damaged
    assert "was made with another VAE, likewise 4 more" in other


def test_an_edited_caption_and_an_edited_clip_are_found(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "clips" / "a.mp4", 5)
    write_caption(clip, "before")
    config = tables(clips_table(tmp_path / "clips", tmp_path / "cache"))
    fill_caches(plan_datasets(config))
    assert check_caches(plan_datasets(config)) == []
    write_caption(clip, "after")
    make_clip(clip, 9)
    latents, text = check_caches(plan_datasets(config))
    assert "is older than a.mp4, which has changed; run wan_cache_latents.py again" in latents
    assert "belongs to another caption" in text


def test_caches_of_another_model_are_named(clips: Path, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}_00000-005_0064x0048_hv.safetensors").write_bytes(b"x")
    problems = check_caches(plan_datasets(tables(clips_table(clips, tmp_path, target_frames=(5,)))))
    assert any("holds 2 caches for HunyuanVideo" in problem for problem in problems)


def test_what_is_not_asked_for_is_named_and_kept(cached: DataPlan, tmp_path: Path) -> None:
    strays = [tmp_path / "cache" / f"old{n}_0064x0048_wan.safetensors" for n in range(7)]
    for stray in strays:
        stray.write_bytes(b"x")
    (line,) = remarks(cached)
    assert line.startswith("7 cache files in ") and "style.toml" in line and "old0_" in line and "and 2 more" in line
    assert all(stray.exists() for stray in strays)
    assert check_caches(cached) == []


def test_image_to_video_caches_are_mentioned_and_used(cached: DataPlan) -> None:
    for item in cached.items:
        shape = (item.pixels.frames + 3) // 4, item.pixels.height // 8, item.pixels.width // 8
        key = "x".join(map(str, shape)) + "_bfloat16"
        tensors = {f"latents_{key}": torch.zeros(16, *shape), f"latents_image_{key}": torch.zeros(20, *shape)}
        save_file(tensors, item.latent_path, metadata={"architecture": "wan"})
    assert check_caches(cached) == []
    (line,) = remarks(cached)
    assert "image-to-video data" in line
