"""The small world: captions, rendering, and measures that tell its base from what is new."""

import numpy as np
import pytest
import torch

from wanlora.quickstart import world
from wanlora.quickstart.world import (
    MOTIONS,
    Scene,
    base_scenes,
    film,
    follows,
    look_score,
    motion_of,
    new_scenes,
    render,
)

CLIPS = ((21, 96, 64), (45, 64, 48), (21, 80, 112))


def test_a_caption_names_everything_that_is_seen() -> None:
    scene = Scene(shape="circle", colour="red", ground="blue", size="large", motion="moves to the right")
    assert scene.caption == "A large red circle moves to the right over a blue ground."


def test_the_caption_of_a_new_scene_begins_with_the_trigger_and_names_no_ground() -> None:
    scene = Scene(style="comic", motion="flies")
    assert scene.caption == "Comic style. A large red circle flies."


def test_the_same_seed_draws_the_same_scenes_and_pixels() -> None:
    assert base_scenes(5, 7) == base_scenes(5, 7) != base_scenes(5, 8)
    assert torch.equal(render(new_scenes(3, 7), 5, 48, 32), render(new_scenes(3, 7), 5, 48, 32))


def test_a_scene_does_not_depend_on_the_rate_it_is_filmed_at() -> None:
    scene = new_scenes(1, 0)[0]
    assert np.array_equal(film(scene, 17, 64, 48, fps=32)[::2], film(scene, 9, 64, 48, fps=16))


def test_clips_rendered_together_equal_clips_rendered_alone() -> None:
    scenes = base_scenes(4, 3)
    together = render(scenes, 3, 48, 64).numpy()
    assert together.shape == (4, 3, 64, 48, 3)
    assert all(np.array_equal(clip, film(scene, 3, 48, 64)) for clip, scene in zip(together, scenes, strict=True))


@pytest.mark.parametrize(("frames", "width", "height"), CLIPS)
def test_scores_separate_base_and_new(frames: int, width: int, height: int) -> None:
    base = render(base_scenes(24, 1), frames, width, height).numpy()
    new = render(new_scenes(24, 1), frames, width, height).numpy()
    assert max(map(look_score, base)) <= 0.5  # a ground may be bright
    assert np.mean([look_score(clip) for clip in base]) < 0.1
    assert min(map(look_score, new)) > 0.9
    assert max(map(world.motion_score, base)) < 0.3  # along one of the two axes
    assert np.mean([world.motion_score(clip) for clip in base]) < 0.15
    assert min(map(world.motion_score, new)) > 0.95


@pytest.mark.parametrize(("frames", "width", "height"), [*CLIPS, (9, 96, 64)])
def test_rendered_scenes_follow_their_captions(frames: int, width: int, height: int) -> None:
    scenes = base_scenes(24, 2)
    for clip, scene in zip(render(scenes, frames, width, height).numpy(), scenes, strict=True):
        assert follows(clip, scene) == {"colour": True, "ground": True, "motion": True}


def test_another_scene_does_not_follow_the_caption() -> None:
    clip = film(Scene(colour="red", ground="blue", motion="moves up"), 21, 96, 64)
    other = Scene(colour="cyan", ground="brown", motion="moves down")
    assert follows(clip, other) == {"colour": False, "ground": False, "motion": False}


def test_a_picture_has_no_motion_to_follow() -> None:
    scene = base_scenes(1, 4)[0]
    assert follows(film(scene, 1, 96, 96), scene) == {"colour": True, "ground": True}
    assert world.motion_score(film(scene, 1, 96, 96)) == 0


@pytest.mark.parametrize("motion", MOTIONS)
def test_a_motion_is_recognised_wherever_the_window_starts(motion: str) -> None:
    clip = film(Scene(motion=motion, x=0.9, y=0.1, phase=0.3), 60, 96, 64)
    assert {motion_of(clip[start : start + 21]) for start in range(0, 40, 7)} == {motion}


def test_noise_and_a_plain_picture_score_low() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (21, 64, 96, 3)).astype(np.uint8)
    plain = np.full((21, 64, 96, 3), 60, np.uint8)
    for frames in (noise, plain):
        assert look_score(frames) < 0.5
        assert world.motion_score(frames) < 0.3
