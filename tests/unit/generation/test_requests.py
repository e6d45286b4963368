"""From prompt lines to complete requests."""

import json
from pathlib import Path
from typing import Any

from wanlora.config.prompts import SamplePrompt, parse_prompt_line
from wanlora.foundation.shapes import LatentShape, PixelShape
from wanlora.generation.requests import resolve, resolve_all
from wanlora.models.wan.spec import TASKS

NEGATIVE = json.loads((Path(__file__).parents[2] / "golden" / "negative-prompts.json").read_text("utf-8"))
SPEC = TASKS["t2v-14B"]


def _prompt(**changes: Any) -> SamplePrompt:
    return SamplePrompt(**{"prompt": "a cat", "where": "prompts.txt: line 1", **changes})


def test_gaps_are_filled_with_the_values_of_the_task() -> None:
    request = resolve(_prompt(), SPEC)
    assert (request.shift, request.guidance, request.steps, request.fps) == (5.0, 5.0, 20, 16)
    assert request.negative_prompt == NEGATIVE["wan2.1 t2v, wan2.2"]
    assert request.pixels == PixelShape(256, 256, 1)


def test_what_the_prompt_says_is_kept() -> None:
    request = resolve(
        _prompt(
            width=384,
            height=208,
            frame_count=45,
            seed=0,
            sample_steps=8,
            discrete_flow_shift=3.0,
            cfg_scale=2.5,
            negative_prompt="rain",
        ),
        SPEC,
    )
    assert (request.shift, request.guidance, request.steps, request.seed) == (3.0, 2.5, 8, 0)
    assert request.texts == ("a cat", "rain")
    assert request.latent == LatentShape(12, 26, 48)
    assert request.recipe == "a cat --w 384 --h 208 --f 45 --d 0 --s 8 --fs 3 --l 2.5 --n rain"


def test_without_guidance_no_negative_text_is_needed() -> None:
    request = resolve(_prompt(cfg_scale=1.0, negative_prompt="rain", seed=3), SPEC)
    assert request.negative_prompt is None
    assert request.texts == ("a cat",)
    assert request.recipe.endswith("--l 1")


def test_an_empty_negative_prompt_is_an_answer() -> None:
    assert resolve(_prompt(negative_prompt=""), SPEC).negative_prompt == ""


def test_a_seed_is_chosen_where_none_is_given() -> None:
    seeds = {resolve(_prompt(), SPEC).seed for _ in range(4)}
    assert len(seeds) > 1
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_requests_come_in_the_order_of_the_prompts() -> None:
    requests = resolve_all([_prompt(prompt=text) for text in ("one", "two", "three")], SPEC)
    assert [request.prompt for request in requests] == ["one", "two", "three"]


def test_the_recipe_is_a_prompt_line_that_asks_for_the_same() -> None:
    request = resolve(_prompt(width=384, frame_count=45), SPEC)
    again = resolve(_prompt(**parse_prompt_line(request.recipe)), SPEC)
    assert again == request
