"""Finding pictures, clips and captions."""

import json
from pathlib import Path

import pytest

from tests.unit.data.clips import make_picture, write_caption
from tests.unit.data.datasets import clips_table, pictures_table
from wanlora.config.dataset import ImageDatasetConfig, VideoDatasetConfig
from wanlora.data.sources import Source, find_sources, require_distinct, some
from wanlora.foundation.errors import DataError


def picture_names(folder: Path) -> list[str]:
    return [source.path.name for source in find_sources(pictures_table(folder, folder))]


def test_a_folder_is_listed_sorted_in_any_case_and_not_below(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.Jpg", "c.webp", "below/d.png", ".hidden.png"):
        write_caption(make_picture(tmp_path / name))
    (tmp_path / "notes.md").write_text("x", encoding="utf-8")
    assert picture_names(tmp_path) == ["a.Jpg", "b.PNG", "c.webp"]


def test_captions_are_stripped_and_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    make_picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes("﻿ Ein Büro,\r\nhell \n".encode())
    assert find_sources(pictures_table(tmp_path, tmp_path))[0].caption == "Ein Büro,\nhell"


@pytest.mark.parametrize("suffix", [".png", ".mp4"])
def test_missing_and_empty_captions_are_listed_together(tmp_path: Path, suffix: str) -> None:
    for name in "abc":
        (tmp_path / f"{name}{suffix}").write_bytes(b"x")
    (tmp_path / "b.txt").write_text("  \n", encoding="utf-8")
    (tmp_path / "c.txt").write_text("fine", encoding="utf-8")
    table = pictures_table(tmp_path, tmp_path) if suffix == ".png" else clips_table(tmp_path, tmp_path)
    with pytest.raises(DataError) as caught:
        find_sources(table)
    assert "1 captions are missing" in str(caught.value) and "a.txt" in str(caught.value)
    assert "are empty: b.txt" in str(caught.value)
    assert "c.txt" not in str(caught.value)
    assert [source.caption for source in find_sources(table, captions=False)] == [None, "", "fine"]


def test_captions_in_another_encoding_are_all_named_beside_those_that_are_missing(tmp_path: Path) -> None:
    for name in "abc":
        make_picture(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_bytes("Büro".encode("latin-1"))
    (tmp_path / "b.txt").write_bytes("office".encode("utf-16"))
    with pytest.raises(DataError) as caught:
        find_sources(pictures_table(tmp_path, tmp_path))
    assert "a.txt is not UTF-8 (byte 1)" in str(caught.value)
    assert "b.txt is not UTF-8 (byte 0)" in str(caught.value)
    assert "1 captions are missing" in str(caught.value) and "c.txt" in str(caught.value)
    assert "empty" not in str(caught.value)


def test_an_empty_or_mistyped_folder_is_an_error_and_nothing_is_deleted(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "a_wan_te.safetensors").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no video"):
        find_sources(clips_table(tmp_path / "empty", cache))
    with pytest.raises(DataError, match="mistyped does not exist"):
        find_sources(clips_table(tmp_path / "mistyped", cache))
    assert (cache / "a_wan_te.safetensors").exists()


def rows_table(path: Path) -> VideoDatasetConfig:
    return VideoDatasetConfig(video_jsonl_file=path, cache_directory=path.parent, where="[[datasets]] 1")


def test_jsonl_rows_are_read_in_order_and_blank_lines_skipped(tmp_path: Path) -> None:
    rows = [{"video_path": "x/b.mp4", "caption": " one\u2028line ", "extra": 1}, {"video_path": "a", "caption": "two"}]
    lines = "\r\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path = tmp_path / "rows.jsonl"
    path.write_bytes("﻿".encode() + lines.encode() + b"\n\n")
    assert find_sources(rows_table(path)) == (
        Source(path=Path("x/b.mp4"), kind="video", caption="one\u2028line"),
        Source(path=Path("a"), kind="video", caption="two"),
    )


def test_pictures_come_from_jsonl_too(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"image_path": "a.png", "caption": "x"}\n{"image_path_0": "b.png", "caption": "y"}', "utf-8")
    table = ImageDatasetConfig(image_jsonl_file=path, cache_directory=tmp_path, where="[[datasets]] 1")
    assert [source.path.name for source in find_sources(table)] == ["a.png", "b.png"]


def test_every_bad_row_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"caption": "x"}\n\n{broken\n{"video_path": "a.mp4"}\n[1]\n', encoding="utf-8")
    with pytest.raises(DataError) as caught:
        find_sources(rows_table(path))
    message = str(caught.value)
    assert "line 1 has no video_path" in message
    assert "line 3 is not JSON" in message
    assert "line 4 has no caption" in message
    assert "line 5 is not a JSON object" in message


@pytest.mark.parametrize("content", [None, "\n\n"])
def test_an_absent_or_empty_jsonl_is_an_error(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=r"rows\.jsonl (does not exist|holds no rows)"):
        find_sources(rows_table(path))


def source(path: str, caption: str | None = None) -> Source:
    return Source(path=Path(path), kind="video", caption=caption)


def test_two_sources_of_one_name_in_one_cache_folder_are_both_named() -> None:
    with pytest.raises(DataError) as caught:
        require_distinct([(Path("cache"), source("p/Clip.mp4")), (Path("cache"), source("q/clip.mkv"))])
    assert str(Path("p/Clip.mp4")) in str(caught.value) and str(Path("q/clip.mkv")) in str(caught.value)
    require_distinct([(Path("cache_1"), source("p/clip.mp4")), (Path("cache_2"), source("q/clip.mp4"))])


def test_one_source_in_two_tables_is_no_collision_unless_its_captions_differ() -> None:
    require_distinct([(Path("c"), source("p/a.mp4", "x")), (Path("c"), source("p/a.mp4", "x"))])
    with pytest.raises(DataError, match="two captions"):
        require_distinct([(Path("c"), source("p/a.mp4", "x")), (Path("c"), source("p/a.mp4", "y"))])


def test_long_lists_are_cut() -> None:
    assert some(["a", "b"]) == "a, b"
    assert some(list("abcdefg")) == "a, b, c, d, e and 2 more"
