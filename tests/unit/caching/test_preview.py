"""--debug_mode console: a picture in the characters of a terminal."""

import re

import numpy as np

from wanlora.caching.preview import drawn


def test_a_picture_is_drawn_two_rows_to_a_line() -> None:
    picture = np.zeros((4, 6, 3), dtype=np.uint8)
    picture[0] = (255, 0, 0)
    picture[1] = (0, 0, 255)
    lines = list(drawn(picture, 6))
    assert [len(re.sub("\x1b\\[[0-9;]*m", "", line)) for line in lines] == [6, 6]
    assert lines[0].startswith("\x1b[38;2;255;0;0m\x1b[48;2;0;0;255m▀")
    assert all(line.endswith("\x1b[0m") for line in lines)


def test_a_wide_picture_is_narrowed_to_the_terminal() -> None:
    picture = np.full((100, 400, 3), 7, dtype=np.uint8)
    lines = list(drawn(picture, 40))
    assert len(lines) == 5
    assert lines[0].count("▀") == 40
