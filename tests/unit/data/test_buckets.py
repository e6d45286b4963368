"""Buckets against the reference tables, resizing against its definition."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from wanlora.data.buckets import BucketSelector, bucket_sizes
from wanlora.data.resize import resize_to_cover
from wanlora.foundation.errors import DataError

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "musubi-golden.json").read_text(encoding="utf-8"))


def name_of(row: dict[str, Any]) -> str:
    return "x".join(map(str, row["resolution"]))


@pytest.mark.parametrize("row", GOLDEN["buckets"], ids=name_of)
def test_buckets_are_those_of_existing_caches(row: dict[str, Any]) -> None:
    width, height = row["resolution"]
    assert [list(size) for size in bucket_sizes((width, height))] == row["buckets"]


@pytest.mark.parametrize("row", GOLDEN["buckets"], ids=name_of)
def test_the_choice_is_that_of_existing_caches(row: dict[str, Any]) -> None:
    width, height = row["resolution"]
    usual = BucketSelector(resolution=(width, height), enabled=True)
    no_upscale = BucketSelector(resolution=(width, height), enabled=True, no_upscale=True)
    for size, expected, expected_no_upscale in row["select"]:
        assert list(usual.select(tuple(size))) == expected
        assert list(no_upscale.select(tuple(size))) == expected_no_upscale


def test_without_buckets_everything_has_the_resolution() -> None:
    selector = BucketSelector(resolution=(384, 208), enabled=False, no_upscale=True)
    assert {selector.select(size) for size in ((1920, 1040), (100, 300))} == {(384, 208)}


def test_a_tiny_resolution_has_a_bucket() -> None:
    assert bucket_sizes((16, 16)) == ((16, 16),)


def test_a_resolution_that_the_model_cannot_take_is_refused_with_the_nearest() -> None:
    with pytest.raises(DataError, match="ask for 848x480"):
        BucketSelector(resolution=(856, 480))
    assert BucketSelector(resolution=(853, 480)).select((1, 1)) == (853, 480)  # 106 latent columns: it can


def test_a_picture_below_a_patch_is_refused_when_it_must_not_grow() -> None:
    with pytest.raises(DataError, match="15x40"):
        BucketSelector(resolution=(64, 64), enabled=True, no_upscale=True).select((15, 40))


def noise(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_a_picture_of_the_right_size_is_untouched() -> None:
    picture = noise(32, 16)
    assert resize_to_cover(picture, 32, 16) is picture


def test_enlarging_uses_lanczos_and_crops_the_centre() -> None:
    picture = noise(20, 11)
    expected = np.asarray(Image.fromarray(picture).resize((40, 22), Image.Resampling.LANCZOS))[3:19, 0:40]
    assert np.array_equal(resize_to_cover(picture, 40, 16), expected)


def test_shrinking_averages_areas_and_crops_the_centre() -> None:
    picture = noise(101, 48)
    scaled = cv2.resize(picture, (34, 16), interpolation=cv2.INTER_AREA)  # 33.67 rounds to 34
    assert np.array_equal(resize_to_cover(picture, 16, 16), scaled[:, 9:25])
