"""Caching from end to end, on real clips and pictures, with a tiny VAE and text encoder."""

import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tiny import SCENES, TinyWan
from wanlora.caching.encoding import Encoded, LatentEncoder, to_pixels
from wanlora.caching.latents import cache_latents
from wanlora.caching.text import cache_text
from wanlora.caching.work import Summary
from wanlora.cli.cache_latents import main as latents_main
from wanlora.config.caching import LatentCacheConfig, TextCacheConfig
from wanlora.data.decoding import decoded
from wanlora.data.resize import Clip, resize_to_cover
from wanlora.foundation.errors import ConfigError, DataError, MemoryPlanError
from wanlora.models.wan.text import TextEncoder, load_tokenizer
from wanlora.models.wan.umt5 import load_umt5
from wanlora.models.wan.vae import load_vae
from wanlora.quickstart.media import write_clip, write_picture

TOML = """
[general]
caption_extension = ".txt"
enable_bucket = true

[[datasets]]
image_directory = '{root}/images'
cache_directory = '{root}/cache_0'
resolution = [32, 32]

[[datasets]]
video_directory = '{root}/videos'
cache_directory = '{root}/cache_1'
resolution = [48, 32]
target_frames = [1, 5]

[[datasets]]
video_directory = '{root}/videos'
cache_directory = '{root}/cache_2'
resolution = [32, 32]
frame_extraction = "uniform"
target_frames = [9]
frame_sample = 2
"""
LATENTS = {
    "cache_0/still_0096x0064_wan.safetensors",
    "cache_1/long_00000-001_0048x0032_wan.safetensors",
    "cache_1/long_00000-005_0048x0032_wan.safetensors",
    "cache_1/short_00000-001_0048x0032_wan.safetensors",
    "cache_1/short_00000-005_0048x0032_wan.safetensors",
    "cache_2/long_00000-009_0032x0032_wan.safetensors",
    "cache_2/long_00004-009_0032x0032_wan.safetensors",
}
TEXTS = {
    "cache_0/still_wan_te.safetensors",
    "cache_1/long_wan_te.safetensors",
    "cache_1/short_wan_te.safetensors",
    "cache_2/long_wan_te.safetensors",
}


class Folder:
    """Two clips and a picture in three sub-datasets, in a folder of its own."""

    def __init__(self, root: Path, models: TinyWan) -> None:
        self.root = root
        self.models = models
        self.toml = root / "style.toml"
        self.toml.write_text(TOML.format(root=root.as_posix()), encoding="utf-8")

    def edit(self, old: str, new: str) -> None:
        """Change the TOML."""
        text = self.toml.read_text(encoding="utf-8")
        assert old in text
        self.toml.write_text(text.replace(old, new), encoding="utf-8")

    def cache_latents(self, *more_tomls: Path, **settings: Any) -> Summary:
        """Run the latents step."""
        files = (self.toml, *more_tomls)
        return cache_latents(LatentCacheConfig(dataset_config=files, vae=self.models.vae, device="cpu", **settings))

    def cache_text(self, **settings: Any) -> Summary:
        """Run the text step."""
        return cache_text(
            TextCacheConfig(dataset_config=(self.toml,), t5=self.models.t5, device="cpu", offline=True, **settings)
        )

    def state(self, suffix: str = ".safetensors") -> dict[str, int]:
        """Every file with this ending below the folder, and when it was written."""
        files = [path for path in self.root.rglob(f"*{suffix}") if not path.name.startswith(".")]
        return {path.relative_to(self.root).as_posix(): path.stat().st_mtime_ns for path in files}

    def changed(self, before: dict[str, int]) -> set[str]:
        """The files that are new or newer than `before`."""
        return {name for name, time in self.state().items() if before.get(name) != time}


@pytest.fixture(scope="module")
def small_media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("small")
    for scene, (name, frames) in zip(SCENES, (("long", 13), ("short", 7)), strict=False):
        write_clip(root / "videos" / f"{name}.mp4", scene, frames=frames, width=96, height=64)
        (root / "videos" / f"{name}.txt").write_text(f"a {name} clip", encoding="utf-8")
    write_picture(root / "images" / "still.png", SCENES[2], width=96, height=64)
    (root / "images" / "still.txt").write_text("a long clip", encoding="utf-8")
    return root


@pytest.fixture
def folder(small_media: Path, tmp_path: Path, tiny_models: TinyWan) -> Folder:
    """Nothing is cached yet."""
    shutil.copytree(small_media, tmp_path / "data")
    return Folder(tmp_path / "data", tiny_models)


@pytest.fixture(scope="module")
def cached_media(small_media: Path, tmp_path_factory: pytest.TempPathFactory, tiny_models: TinyWan) -> Path:
    root = tmp_path_factory.mktemp("cached") / "data"
    shutil.copytree(small_media, root)
    made = Folder(root, tiny_models)
    made.cache_latents()
    made.cache_text()
    return root


@pytest.fixture
def cached(cached_media: Path, tmp_path: Path, tiny_models: TinyWan) -> Folder:
    """Everything is cached."""
    shutil.copytree(cached_media, tmp_path / "data")
    return Folder(tmp_path / "data", tiny_models)


@pytest.fixture(autouse=True)
def _console(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "wanlora")


def frames_of(path: Path) -> list[Clip]:
    """Every frame of a clip, as it is stored."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_caches_have_the_names_that_musubi_gives_them(cached: Folder) -> None:
    assert cached.state().keys() == LATENTS | TEXTS


def test_latents_are_those_of_the_decoded_frames(cached: Folder) -> None:
    vae = load_vae(cached.models.vae, device="cpu")
    frames = [resize_to_cover(frame, 32, 32) for frame in frames_of(cached.root / "videos" / "long.mp4")[4:13]]
    expected = vae.encode(to_pixels([np.stack(frames)]))[0].to(torch.bfloat16)
    stored = load_file(cached.root / "cache_2" / "long_00004-009_0032x0032_wan.safetensors")
    assert list(stored) == ["latents_3x4x4_bfloat16"]
    torch.testing.assert_close(stored["latents_3x4x4_bfloat16"], expected)


def test_files_carry_the_metadata_that_musubi_writes(cached: Folder) -> None:
    with safe_open(cached.root / "cache_1" / "long_00000-005_0048x0032_wan.safetensors", "pt") as file:
        metadata = file.metadata()
    known = {key: metadata[key] for key in ("architecture", "format_version", "width", "height", "frame_count")}
    assert known == {
        "architecture": "wan",
        "format_version": "1.0.1",
        "width": "48",
        "height": "32",
        "frame_count": "5",
    }
    with safe_open(cached.root / "cache_1" / "long_wan_te.safetensors", "pt") as file:
        assert file.metadata()["caption1"] == "a long clip"


def test_text_is_the_encoders_output_at_its_real_length(cached: Folder) -> None:
    models = cached.models
    encoder = TextEncoder(load_umt5(models.t5, device="cpu"), load_tokenizer(None, models.t5, True))
    stored = load_file(cached.root / "cache_1" / "short_wan_te.safetensors")
    assert list(stored) == ["varlen_t5_bfloat16"]
    assert torch.equal(stored["varlen_t5_bfloat16"], encoder.encode(["a short clip"])[0])


_WATCHED = """
import json, sys
opened = []
sys.addaudithook(lambda event, about: opened.append(str(about[0])) if event == "open" else None)
from wanlora.cli.{script} import main
code = main(sys.argv[1:])
print(json.dumps({{"code": code, "modules": list(sys.modules), "opened": opened}}))
"""


@pytest.mark.parametrize("script", ["cache_latents", "cache_text_encoder_outputs"])
def test_a_rerun_imports_no_torch_and_no_decoder_and_opens_no_source(cached: Folder, script: str) -> None:
    before = cached.state()
    model = ["--vae", str(cached.models.vae)] if script == "cache_latents" else ["--t5", str(cached.models.t5)]
    command = [sys.executable, "-c", _WATCHED.format(script=script), "--dataset_config", str(cached.toml), *model]
    here = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    report = json.loads(subprocess.run(command, capture_output=True, check=True, env=here).stdout)
    assert report["code"] == 0
    assert not {"torch", "av", "cv2", "PIL", "safetensors"} & set(report["modules"])
    watched = [path.removeprefix(f"{cached.root}/") for path in report["opened"] if path.startswith(str(cached.root))]
    opened = Counter(name for name in watched if name.endswith((".mp4", ".png", ".safetensors")))
    asked = LATENTS if script == "cache_latents" else TEXTS
    firsts = [min(name for name in LATENTS if name.startswith(f"cache_{number}")) for number in range(3)]
    assert opened == Counter(asked) + Counter(firsts)  # each once, and a latent of each folder for a remark about it
    assert not cached.changed(before)


def test_each_clip_is_decoded_once_for_all_windows_and_sizes(folder: Folder) -> None:
    passes = decoded.passes
    folder.cache_latents()
    assert decoded.passes == passes + 2


def test_a_changed_caption_is_encoded_again_and_nothing_else(cached: Folder, caplog: pytest.LogCaptureFixture) -> None:
    before = cached.state()
    (cached.root / "videos" / "long.txt").write_text("a longer clip", encoding="utf-8")
    cached.cache_latents()
    cached.cache_text()
    assert cached.changed(before) == {"cache_1/long_wan_te.safetensors", "cache_2/long_wan_te.safetensors"}
    assert "encode 2 of 4 captions: 2 stale" in caplog.text


def test_a_changed_clip_is_encoded_again_and_nothing_else(cached: Folder, caplog: pytest.LogCaptureFixture) -> None:
    before = cached.state()
    write_clip(cached.root / "videos" / "short.mp4", SCENES[4], frames=7, width=96, height=64)
    cached.cache_latents()
    assert cached.changed(before) == {name for name in LATENTS if "short" in name}
    assert "encode 2 of 7 latents: 2 stale" in caplog.text
    assert "2 x is older than its source" in caplog.text


def test_a_changed_resolution_is_encoded_again_and_nothing_else(cached: Folder) -> None:
    before = cached.state()
    cached.edit("resolution = [48, 32]", "resolution = [96, 64]")
    cached.edit("resolution = [32, 32]\n\n", "resolution = [64, 48]\n\n")
    cached.cache_latents()
    sizes = {name.replace("0048x0032", "0096x0064") for name in LATENTS if "cache_1" in name}
    assert cached.changed(before) == sizes | {"cache_0/still_0096x0064_wan.safetensors"}
    assert before.keys() <= cached.state().keys()
    assert list(load_file(cached.root / "cache_0" / "still_0096x0064_wan.safetensors")) == ["latents_1x6x8_bfloat16"]


def test_a_damaged_cache_file_is_made_again(cached: Folder) -> None:
    broken = cached.root / "cache_2" / "long_00000-009_0032x0032_wan.safetensors"
    before = {key: tensor.clone() for key, tensor in load_file(broken).items()}
    content = broken.read_bytes()
    broken.write_bytes(content[: len(content) // 2])
    assert cached.cache_latents().written == 1
    again = load_file(broken)
    assert all(torch.equal(again[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize("damage", ["empty", "mistyped"])
def test_an_empty_or_mistyped_folder_deletes_nothing(cached: Folder, damage: str) -> None:
    before = cached.state()
    if damage == "mistyped":
        cached.edit("/videos'", "/vidoes'")
    else:
        for path in (cached.root / "videos").iterdir():
            path.unlink()
    with pytest.raises(DataError):
        cached.cache_latents()
    with pytest.raises(DataError):
        cached.cache_text()
    assert cached.state() == before


def test_caches_that_musubi_made_are_kept(cached: Folder) -> None:
    for name in LATENTS | TEXTS:
        path = cached.root / name
        with safe_open(path, "pt") as file:
            metadata = {key: value for key, value in file.metadata().items() if not key.startswith("wanlora")}
        tensors = load_file(path)
        path.unlink()
        save_file(tensors, path, metadata=metadata)
    shutil.rmtree(cached.root / "cache_0" / "wanlora_index.json", ignore_errors=True)
    before = cached.state()
    assert cached.cache_latents().written == 0
    assert cached.cache_text().written == 0
    assert not cached.changed(before)


def test_files_that_are_not_asked_for_are_named_and_stay(cached: Folder, caplog: pytest.LogCaptureFixture) -> None:
    foreign = cached.root / "cache_1" / "holiday_00000-005_0048x0032_wan.safetensors"
    foreign.write_bytes(b"mine")
    cached.cache_latents()
    assert foreign.read_bytes() == b"mine"
    assert foreign.name in caplog.text


def test_a_clip_that_cannot_be_decoded_is_named_and_the_rest_is_cached(folder: Folder) -> None:
    clip = folder.root / "videos" / "short.mp4"
    write_clip(clip, SCENES[1], frames=90, width=96, height=64)
    content = bytearray(clip.read_bytes())
    start = content.index(b"mdat") + len(content) // 3
    content[start : start + len(content) // 3] = bytes(len(content) // 3)
    clip.write_bytes(content)
    with pytest.raises(DataError, match=r"short\.mp4"):
        folder.cache_latents()
    made = folder.state().keys()
    assert {name for name in LATENTS if "short" not in name} <= made
    assert not {name for name in made if "cache_2/short_00081" in name}


def test_one_dataset_file_with_faulty_data_does_not_stop_the_others(
    folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    other = folder.root / "other.toml"
    other.write_text("[[datasets]]\nvideo_directory = 'nowhere'\ncaption_extension = '.txt'\n", encoding="utf-8")
    with pytest.raises(DataError, match="nowhere"):
        folder.cache_latents(other)
    assert folder.state().keys() == LATENTS
    assert "left out" in caplog.text


def test_validation_is_cached_like_everything_else(cached: Folder, caplog: pytest.LogCaptureFixture) -> None:
    before = cached.state()
    (cached.root / "unseen").mkdir()
    shutil.copy(cached.root / "videos" / "short.mp4", cached.root / "unseen" / "new.mp4")
    (cached.root / "unseen" / "new.txt").write_text("a new clip", encoding="utf-8")
    with cached.toml.open("a", encoding="utf-8") as file:
        for number, folder in enumerate(("unseen", "videos")):
            file.write(
                f"[[validation]]\nvideo_directory = '{cached.root.as_posix()}/{folder}'\ntarget_frames = [1, 5]\n"
                f"cache_directory = '{cached.root.as_posix()}/validation_{number}'\nresolution = [32, 32]\n"
            )
    latents, texts = cached.cache_latents(), cached.cache_text()
    assert (
        "  validation: 1 clip x 2 windows (1, 5 frames) + 2 clips x 2 windows (1, 5 frames) = 6 samples"
        in caplog.messages
    )
    assert "2 validation clips are also trained on (long.mp4, short.mp4)" in caplog.text
    assert (latents.tallies[0].asked, latents.written, latents.tallies[0].fresh) == (len(LATENTS) + 6, 6, len(LATENTS))
    assert (texts.tallies[0].asked, texts.written) == (len(TEXTS) + 3, 3)
    assert {Path(name).parent.name for name in cached.changed(before)} == {"validation_0", "validation_1"}
    (new,) = (cached.root / "validation_0").glob("new_00000-005_*_wan.safetensors")
    stored = load_file(new)["latents_2x4x4_bfloat16"]
    frames = [resize_to_cover(frame, 32, 32) for frame in frames_of(cached.root / "unseen" / "new.mp4")[:5]]
    vae = load_vae(cached.models.vae, device="cpu")
    torch.testing.assert_close(stored, vae.encode(to_pixels([np.stack(frames)]))[0].to(torch.bfloat16))


def test_a_misspelt_dataset_file_stops_everything_and_all_problems_are_listed(folder: Folder) -> None:
    other = folder.root / "other.toml"
    other.write_text("[[datasets]]\nvideo_directory = 'x'\nframe_sampel = 2\n", encoding="utf-8")
    folder.models = dataclasses.replace(folder.models, vae=folder.root / "absent_vae.safetensors")
    with pytest.raises(ConfigError, match="did you mean 'frame_sample'") as error:
        folder.cache_latents(other)
    assert "--vae: there is no" in str(error.value)
    assert not folder.state()


def test_files_that_two_dataset_files_share_are_encoded_once(folder: Folder) -> None:
    twin = folder.root / "twin.toml"
    twin.write_text(folder.toml.read_text(encoding="utf-8"), encoding="utf-8")
    summary = folder.cache_latents(twin)
    assert summary.written == len(LATENTS)
    assert [tally.encoded for tally in summary.tallies] == [len(LATENTS)] * 2


def test_two_dataset_files_that_want_different_content_in_one_file_are_refused(folder: Folder) -> None:
    twin = folder.root / "twin.toml"
    text = folder.toml.read_text(encoding="utf-8").replace("resolution = [32, 32]\n\n", "resolution = [64, 48]\n\n")
    twin.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match="different content"):
        folder.cache_latents(twin)
    assert not folder.state()


def test_a_dry_run_writes_nothing(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    before = folder.state("")
    folder.cache_latents(dry_run=True)
    folder.cache_text(dry_run=True)
    assert folder.state("") == before
    assert "encode 7 of 7 latents: 7 missing" in caplog.text
    assert "short.mp4: 7 frames, 0 of 2 windows" in caplog.text


def test_after_ctrl_c_every_file_is_whole_and_a_rerun_makes_the_rest(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[int] = []
    encode = LatentEncoder.encode

    def interrupted(self: LatentEncoder, clips: Sequence[Clip]) -> Encoded:
        calls.append(len(clips))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return encode(self, clips)

    monkeypatch.setattr(LatentEncoder, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        folder.cache_latents()
    assert "3 of 7" in caplog.text
    assert len(folder.state()) == 3
    assert not list(folder.root.rglob("*.tmp*"))
    assert folder.cache_latents().written == 4


def test_batches_give_the_latents_of_single_clips(cached: Folder) -> None:
    before = {name: load_file(cached.root / name) for name in LATENTS}
    for name in LATENTS:
        (cached.root / name).unlink()
    assert cached.cache_latents(batch_size=2).written == len(LATENTS)
    for name, tensors in before.items():
        again = load_file(cached.root / name)
        for key, tensor in tensors.items():
            torch.testing.assert_close(again[key], tensor, rtol=0.02, atol=0.02)


def test_a_chosen_dtype_is_used_and_stored(cached: Folder) -> None:
    assert cached.cache_latents(vae_dtype="bf16").written == len(LATENTS)
    path = cached.root / "cache_0" / "still_0096x0064_wan.safetensors"
    with safe_open(path, "pt") as file:
        assert file.metadata()["wanlora_vae_dtype"] == "bfloat16"
    assert cached.cache_latents(vae_dtype="bf16").written == 0


def test_another_vae_makes_everything_again(cached: Folder, tmp_path: Path) -> None:
    other = tmp_path / "other_vae.safetensors"
    tensors = load_file(cached.models.vae)
    save_file({name: tensor * 1.5 for name, tensor in tensors.items()}, other)
    cached.models = dataclasses.replace(cached.models, vae=other)
    assert cached.cache_latents().written == len(LATENTS)


def test_a_caption_is_encoded_once_however_many_files_share_it(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    encode = TextEncoder.encode

    def counted(self: TextEncoder, texts: Sequence[str], batch_size: int = 16) -> list[torch.Tensor]:
        seen.extend(texts)
        return encode(self, texts, batch_size)

    monkeypatch.setattr(TextEncoder, "encode", counted)
    assert folder.cache_text(batch_size=16).written == 4
    assert sorted(seen) == ["a long clip", "a short clip"]


def test_captions_that_are_too_long_are_named(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    (folder.root / "videos" / "short.txt").write_text("word " * 600, encoding="utf-8")
    folder.cache_text()
    assert "1 captions are longer than 512 tokens and will be cut: short.mp4" in caplog.text
    assert load_file(folder.root / "cache_1" / "short_wan_te.safetensors")["varlen_t5_bfloat16"].shape == (512, 64)


def test_debug_mode_shows_what_the_vae_would_get(folder: Folder) -> None:
    folder.cache_latents(debug_mode="video")
    assert not folder.state()
    assert len(folder.state(".png")) == 1 + 3
    assert len(frames_of(folder.root / "cache_2" / "debug" / "long_00004-009_0032x0032_wan.mp4")) == 9


@pytest.mark.parametrize(
    ("tiling", "cure"), [("auto", "again with --vae_cache_cpu"), ("off", "without --vae_tiling off, .*--vae_cache_cpu")]
)
def test_running_out_of_memory_is_an_error_with_a_cure(
    folder: Folder, tiling: str, cure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr("wanlora.models.wan.vae.WanVAE.encode", full)
    with pytest.raises(MemoryPlanError, match=cure):
        folder.cache_latents(vae_tiling=tiling)


def test_tiles_give_the_same_latents(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def latents() -> dict[str, Tensor]:
        return {name: next(iter(load_file(folder.root / name).values())) for name in folder.state()}

    folder.cache_latents(vae_dtype="float32")
    whole = latents()
    for name in whole:
        (folder.root / name).unlink()
    monkeypatch.setattr("wanlora.memory.tiling._NARROWEST", 2)
    assert folder.cache_latents(vae_dtype="float32", vae_tiling="on").written == len(LATENTS)
    assert "48x32x5 is encoded in 2 tiles (2x1) of 24x32 and what lies around them (--vae_tiling on)" in caplog.text
    torch.testing.assert_close(latents(), whole, atol=1e-5, rtol=1e-5)


def test_the_script_ends_with_two_when_something_failed(folder: Folder) -> None:
    (folder.root / "videos" / "short.txt").unlink()
    flags = ["--dataset_config", str(folder.toml), "--vae", str(folder.models.vae), "--device", "cpu"]
    assert latents_main(flags) == 2
    (folder.root / "videos" / "short.txt").write_text("a short clip", encoding="utf-8")
    assert latents_main(flags) == 0
    assert folder.state().keys() == LATENTS


def test_a_device_that_is_not_there_is_refused_before_anything_is_read(folder: Folder) -> None:
    config = LatentCacheConfig(dataset_config=(folder.toml,), vae=folder.models.vae, device="cuda:99")
    with pytest.raises(ConfigError, match="cuda:99"):
        cache_latents(config)
