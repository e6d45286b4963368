"""Cache files and saved states that do not fit what is asked of them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.integration.bench import (
    CACHING,
    CACHING_TEXT,
    CLIP_CACHE,
    LATENTS,
    PICTURE_CACHE,
    PICTURE_TEXT,
    TEXTS,
    TRAIN,
    TRAINING,
    Bench,
    Case,
    check,
    parametrised,
    snapshot,
)

Spoil = Callable[[Bench], object]
Tensors = dict[str, Any]
LATENTS_CURE, TEXT_CURE = "run wan_cache_latents.py", "run wan_cache_text_encoder_outputs.py"


def remove(*names: str) -> Spoil:
    """Delete files."""

    def spoil(bench: Bench) -> None:
        for name in names:
            (bench.folder / name).unlink()

    return spoil


def cut(name: str) -> Spoil:
    """Half a file."""
    return lambda bench: bench.cut(name)


def replace_tensor(name: str, alter: Callable[[torch.Tensor], torch.Tensor]) -> Spoil:
    """Another tensor under the same key."""

    def change(tensors: Tensors) -> None:
        key = next(iter(tensors))
        tensors[key] = alter(tensors[key]).contiguous()

    return lambda bench: bench.change_tensors(name, change)


def of_architecture(name: str, architecture: str) -> Spoil:
    """The same file as another model's caches call themselves."""

    def spoil(bench: Bench) -> None:
        tensors = {key: tensor.clone() for key, tensor in load_file(bench.folder / name).items()}
        save_file(tensors, bench.folder / name, metadata={"architecture": architecture})

    return spoil


def with_nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor.view(-1)[0] = float("nan")
    return tensor


def remove_all_caches(bench: Bench) -> None:
    for folder in bench.folder.glob("cache_*"):
        shutil.rmtree(folder)


def change_picture(bench: Bench) -> None:
    shutil.copy(bench.folder / "images" / "yellow.png", bench.folder / "images" / "red.png")


CACHES = {
    "missing latents": Case(spoil=remove(PICTURE_CACHE), says=(f"{PICTURE_CACHE} is missing; {LATENTS_CURE}",)),
    "missing text": Case(spoil=remove(PICTURE_TEXT), says=(f"{PICTURE_TEXT} is missing; {TEXT_CURE}",)),
    "no caches at all": Case(
        spoil=remove_all_caches,
        says=("4 problems", f"{LATENTS_CURE}", f"{TEXT_CURE}", "likewise 3 more"),
    ),
    "another size of clips": Case(
        spoil=lambda bench: bench.change("style.toml", "[48, 32]", "[64, 64]"),
        says=("was cached for 48x32, the dataset now asks for 80x48", f"{LATENTS_CURE} again"),
    ),
    "another size of pictures": Case(
        spoil=lambda bench: bench.change("style.toml", "[32, 32]", "[64, 64]"),
        says=(f"{PICTURE_CACHE} was cached for 32x32, the dataset now asks for", f"{LATENTS_CURE} again"),
    ),
    "other windows": Case(
        spoil=lambda bench: bench.change("style.toml", "[1, 5]", "[1, 9]"),
        says=("green_00000-009_0048x0032_wan.safetensors is missing", LATENTS_CURE),
    ),
    "a changed picture": Case(
        spoil=change_picture, says=(f"{PICTURE_CACHE} is older than red.png, which has changed; {LATENTS_CURE} again",)
    ),
    "a changed caption": Case(
        spoil=lambda bench: bench.write("images/red.txt", "Something else"),
        says=(f"{PICTURE_TEXT} belongs to another caption than the one that stands there now; {TEXT_CURE} again",),
    ),
    "latents cut off": Case(
        spoil=cut(CLIP_CACHE), says=(f"{CLIP_CACHE} cannot be read", "is cut off", f"{LATENTS_CURE} again")
    ),
    "text cut off": Case(
        spoil=cut(PICTURE_TEXT), says=(f"{PICTURE_TEXT} cannot be read", "is cut off", f"{TEXT_CURE} again")
    ),
    "latents of another model": Case(
        spoil=of_architecture(CLIP_CACHE, "hunyuan_video"),
        says=(f"{CLIP_CACHE} belongs to another model (hunyuan_video); {LATENTS_CURE} again",),
    ),
    "text of another model": Case(
        spoil=of_architecture(PICTURE_TEXT, "flux_kontext"),
        says=(f"{PICTURE_TEXT} belongs to another model (flux_kontext); {TEXT_CURE} again",),
    ),
    "latents of another VAE": Case(
        spoil=replace_tensor(CLIP_CACHE, lambda latents: latents.repeat(3, 1, 1, 1)),
        says=(f"{CLIP_CACHE} holds latents of 48 channels where the model reads 16", LATENTS_CURE),
    ),
    "text of another encoder": Case(
        spoil=replace_tensor(PICTURE_TEXT, lambda text: text.repeat(1, 2)),
        says=(f"{PICTURE_TEXT} holds 128 numbers a token where the model reads 64", TEXT_CURE),
    ),
    "text in the place of latents": Case(
        spoil=lambda bench: shutil.copy(bench.folder / PICTURE_TEXT, bench.folder / PICTURE_CACHE),
        says=(f"{PICTURE_CACHE} cannot be read", "holds no latents", LATENTS_CURE),
    ),
    "caches of another model beside": Case(
        spoil=lambda bench: (bench.folder / PICTURE_CACHE).rename(
            bench.folder / "cache_images/red_0064x0048_hv.safetensors"
        ),
        says=(f"{PICTURE_CACHE} is missing", "HunyuanVideo"),
    ),
}
STATES = {
    "missing": Case(
        flags=("--resume", "output/style-state"), says=("--resume output/style-state does not exist", "latest")
    ),
    "a file": Case(
        flags=("--resume", "prompts.txt"), says=("--resume prompts.txt", "give a folder whose name ends in -state")
    ),
    "another folder": Case(
        flags=("--resume", "images"), says=("--resume images holds no state", "run.json is missing")
    ),
    "of musubi": Case(
        spoil=lambda bench: bench.write("old-state/scheduler.bin", "x"),
        flags=("--resume", "old-state"),
        says=("--resume old-state is a state of musubi's", "start a new run with --network_weights"),
    ),
    "cut off": Case(
        spoil=cut("states/style-state/run.json"),
        flags=("--resume", "states/style-state"),
        says=("run.json cannot be read",),
    ),
    "of another version": Case(
        spoil=lambda bench: bench.change("states/style-state/run.json", "wanlora state 1", "wanlora state 9"),
        flags=("--resume", "states/style-state"),
        says=("run.json cannot be read (it was written by another version)", "resume from another state"),
    ),
    "that is no table": Case(
        spoil=lambda bench: bench.write("states/style-state/run.json", "[1, 2]"),
        flags=("--resume", "states/style-state"),
        says=("run.json cannot be read",),
    ),
    "without its adapter": Case(
        spoil=remove("states/style-state/model.safetensors"),
        flags=("--resume", "states/style-state"),
        says=("style-state/model.safetensors", "does not exist"),
    ),
    "with half its optimizer": Case(
        spoil=cut("states/style-state/optimizer.bin"),
        flags=("--resume", "states/style-state", "--max_train_steps", "3"),
        says=("optimizer.bin cannot be read", "resume from another state"),
    ),
    "of another rank": Case(
        flags=("--resume", "states/style-state", "--network_dim", "8"),
        says=("states/style-state", "[4, 128], this run as [8, 128]", "--network_dim it was made with"),
    ),
    "of other modules": Case(
        flags=("--resume", "states/style-state", "--network_args", "include_patterns=['.*ffn']"),
        says=("adapts other modules than this run", "resume with the network arguments it was made with"),
    ),
}


@pytest.fixture(scope="session")
def _state(_furnished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of one step leaves behind."""
    folder = tmp_path_factory.mktemp("trained")
    flags = [*TRAIN, "--output_dir", str(folder), "--save_state"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(_furnished)
        assert TRAINING(flags) == 0
    return folder


@pytest.fixture
def trained(bench: Bench, _state: Path) -> Bench:
    """The bench with the results of a run in `states`."""
    shutil.copytree(_state, bench.folder / "states")
    return bench


@parametrised(CACHES)
def test_caches(bench: Bench, case: Case) -> None:
    check(bench, TRAINING, TRAIN, case)


@parametrised(STATES)
def test_states(trained: Bench, case: Case) -> None:
    check(trained, TRAINING, TRAIN, case)


@pytest.mark.parametrize(("name", "cure"), [(CLIP_CACHE, "cache"), (PICTURE_TEXT, "cache")], ids=["latents", "text"])
def test_a_value_that_is_no_number_ends_the_run_and_names_the_file(bench: Bench, name: str, cure: str) -> None:
    replace_tensor(name, with_nan)(bench)
    before = snapshot(bench.folder)
    code, printed = bench.call(TRAINING, *TRAIN, "--max_train_epochs", "1")
    assert code == 2, printed
    assert f"error: {name} holds values that are not finite; delete it and {cure} again" in printed
    assert "Traceback" not in printed
    after = snapshot(bench.folder)
    assert {file: after[file] for file in before} == before


def test_latest_without_a_state_begins_anew(bench: Bench) -> None:
    code, printed = bench.call(TRAINING, *TRAIN, "--resume", "latest", "--dry_run")
    assert code == 0, printed
    assert "--resume latest: output holds no state of style yet; this run begins anew" in printed


def test_latest_passes_over_states_that_are_broken(trained: Bench) -> None:
    shutil.copytree(trained.folder / "states/style-state", trained.folder / "states/style-step00000009-state")
    trained.cut("states/style-step00000009-state/run.json")
    code, printed = trained.call(TRAINING, *TRAIN, "--output_dir", "states", "--resume", "latest", "--dry_run")
    assert code == 0, printed
    assert f"resuming {Path('states/style-state')}" in printed


def test_a_dry_run_changes_nothing(bench: Bench) -> None:
    shutil.rmtree(bench.folder / "cache_videos")
    before = snapshot(bench.folder)
    for main, flags in ((CACHING, LATENTS), (CACHING_TEXT, TEXTS)):
        code, printed = bench.call(main, *flags, "--dry_run")
        assert code == 0, printed
        assert snapshot(bench.folder) == before


def test_broken_caches_are_made_again(bench: Bench) -> None:
    bench.cut(CLIP_CACHE)
    bench.cut(PICTURE_TEXT)
    for main, flags in ((CACHING, LATENTS), (CACHING_TEXT, TEXTS)):
        assert bench.call(main, *flags)[0] == 0
    code, printed = bench.call(TRAINING, *TRAIN, "--dry_run")
    assert code == 0, printed


def test_a_broken_index_is_measured_again(bench: Bench) -> None:
    index = bench.folder / "cache_videos" / "wanlora_index.json"
    for content in ("{", "[]", '{"format": 1}', json.dumps({"format": 1, "sources": {"green.mp4": {"kind": "video"}}})):
        index.write_text(content)
        code, printed = bench.call(CACHING, *LATENTS)
        assert code == 0, printed
