"""Prompt files of all three kinds."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from wanlora.config.prompts import SamplePrompt, parse_prompt_line, read_prompts
from wanlora.foundation.errors import ConfigError

Write = Callable[[str, str], Path]
GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "musubi-golden.json").read_text(encoding="utf-8"))


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        read_prompts(path)
    return str(caught.value)


@pytest.mark.parametrize(("line", "values"), GOLDEN["prompt_lines"])
def test_lines_read_as_in_musubi(line: str, values: dict[str, Any]) -> None:
    assert parse_prompt_line(line) == values


def test_the_reference_file(write: Write, said: list[str]) -> None:
    text = "Studio style. Woman with blonde hair is walking on the beach, camera zoom out."
    path = write("sampling.txt", f"# prompt 1\n{text}  --w 384 --h 384 --f 45 --d 7 --s 20\n")
    expected = SamplePrompt(
        where="sampling.txt line 2", prompt=text, width=384, height=384, frame_count=45, seed=7, sample_steps=20
    )
    assert read_prompts(path) == (expected,)
    assert said == []


@pytest.mark.parametrize(
    "text",
    ["I walk on the grass", "D 5 is a chord", "n people", "w 640", "a man -- tall -- smiles", "x--w 5", "# not first"],
)
def test_a_prompt_that_looks_like_an_option_is_a_prompt(text: str) -> None:
    assert parse_prompt_line(f"{text} --s 9") == {"prompt": text, "sample_steps": 9}


def test_comments_blank_lines_byte_order_mark_and_crlf(write: Write) -> None:
    path = write("p.txt", "\ufeff# one\r\n\r\nzwei äöü 映画\r\n # three\r\n")
    assert [prompt.prompt for prompt in read_prompts(path)] == ["zwei äöü 映画", "# three"]
    assert [prompt.where for prompt in read_prompts(path)] == ["p.txt line 3", "p.txt line 4"]


def test_options_in_any_case_with_any_blanks() -> None:
    line = "cat\t--W 640  --FS 5.5 --L 1 --n ugly, blurred -- grey"
    expected = {"width": 640, "discrete_flow_shift": 5.5, "cfg_scale": 1.0, "negative_prompt": "ugly, blurred -- grey"}
    assert parse_prompt_line(line) == {"prompt": "cat", **expected}


def test_defaults_leave_the_tasks_settings_alone(write: Write) -> None:
    (prompt,) = read_prompts(write("p.txt", "cat"))
    assert (prompt.width, prompt.height, prompt.frame_count, prompt.sample_steps) == (256, 256, 1, 20)
    assert prompt.seed is prompt.cfg_scale is prompt.discrete_flow_shift is prompt.negative_prompt is None


def test_sizes_that_the_model_does_not_have_are_lowered_and_said(write: Write, said: list[str]) -> None:
    (prompt,) = read_prompts(write("p.txt", "cat --w 72 --h 100 --f 48 --s 5000 --d 3.7"))
    assert (prompt.width, prompt.height, prompt.frame_count, prompt.sample_steps) == (64, 96, 45, 1000)
    assert prompt.seed == 3
    assert said == [
        "p.txt line 1: --s 5000 becomes 1000: there are 1 to 1000 steps",
        "p.txt line 1: --d 3.7 is read as 3",
        "p.txt line 1: width 72 becomes 64: sides are multiples of 16",
        "p.txt line 1: height 100 becomes 96: sides are multiples of 16",
        "p.txt line 1: frame_count 48 becomes 45: lengths are 4k + 1",
    ]


@pytest.mark.parametrize(
    "option", ["--i cat.png", "--ei b.png", "--cn c.mp4", "--ci d.png", "--of target_index=1", "--g 5"]
)
def test_options_of_other_models_are_answered_with_their_line(write: Write, said: list[str], option: str) -> None:
    (prompt,) = read_prompts(write("p.txt", f"cat {option} --s 9"))
    assert prompt.sample_steps == 9
    assert len(said) == 1 and said[0].startswith(f"p.txt line 1: {option.split()[0]} ")


def test_an_empty_negative_prompt_is_said(said: list[str]) -> None:
    assert parse_prompt_line("cat --n", "p.txt line 1") == {"prompt": "cat"}
    assert said == ["p.txt line 1: --n without words means Wan's own negative prompt; --l 1 turns guidance off"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("cat --x 5", "unknown option --x; known: --w, --h, --f, --d, --s, --fs, --l, --n"),
        ("cat --width 640", "unknown option --width (did you mean --w?)"),
        ("cat --steps 20", "unknown option --steps (did you mean --s?)"),
        ("cat --w", "--w (width) needs a value"),
        ("cat --w wide", "--w (width) must be a whole number, got 'wide'"),
        ("cat --w 8", "--w (width) must be at least 16, got 8"),
        ("cat --f 0", "--f (frame_count) must be at least 1, got 0"),
        ("cat --d -1", "--d (seed) must be at least 0, got -1"),
        ("cat --s many", "--s (sample_steps) must be a whole number, got 'many'"),
        ("cat --s -4", "--s (sample_steps) must be at least 1"),
        ("cat --l 3,5", "--l (cfg_scale) must be a number, got '3,5'"),
        ("cat --fs 0", "--fs (discrete_flow_shift) must be above 0, got 0"),
        ("--w 640 --h 480", "there is no prompt text"),
    ],
)
def test_a_bad_line_is_refused_with_file_and_line(write: Write, line: str, message: str) -> None:
    assert refusal(write("p.txt", f"# c\n{line}\n")).startswith(f"p.txt line 2: {message}")


def test_all_bad_lines_are_reported_at_once(write: Write) -> None:
    error = refusal(write("p.txt", "a --x 1 --w b\nfine\nc --d -1\n"))
    assert error.startswith("3 problems:") and "line 1" in error and "line 3" in error


def test_toml_subsets_share_what_stands_above(write: Write, said: list[str]) -> None:
    text = """
[prompt]
width = 640
height = 360
cfg_scale = 5
[[prompt.subset]]
prompt = "cat"
[[prompt.subset]]
prompt = "dog"
width = 320
seed = 4
image_path = "a.png"
"""
    cat, dog = read_prompts(write("p.toml", text))
    assert (cat.width, cat.height, cat.cfg_scale, cat.seed) == (640, 352, 5.0, None)
    assert (dog.prompt, dog.width, dog.seed, dog.where) == ("dog", 320, 4, "p.toml: [[prompt.subset]] 2")
    assert "p.toml line 12: image_path concerns image-to-video models; the preview is made from the text alone" in said


def test_toml_with_a_single_prompt(write: Write) -> None:
    (prompt,) = read_prompts(write("p.toml", '[prompt]\nprompt = "cat"\nframe_count = 5'))
    assert (prompt.prompt, prompt.frame_count) == ("cat", 5)


def test_json_lists_of_lines_and_tables(write: Write) -> None:
    path = write("p.json", json.dumps(["cat --w 64", {"prompt": "dog", "height": 64, "negative_prompt": ""}]))
    cat, dog = read_prompts(path)
    assert (cat.prompt, cat.width, dog.height, dog.negative_prompt) == ("cat", 64, 64, "")
    assert dog.where == "p.json: prompt 2"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.toml", '[prompt]\nprompt = "a"\nwidht = 5', "p.toml line 3: unknown key 'widht' (did you mean 'width'?)"),
        (
            "p.toml",
            '[prompt]\n[[prompt.subset]]\nprompt = "a"\nwidth = "5"',
            "p.toml line 4: width must be a whole number",
        ),
        ("p.toml", '[prompt]\nwidth = 5\n[[prompt.subset]]\nprompt = "a"', "p.toml line 2: width must be at least 16"),
        ("p.toml", "[prompt]\nwidth = 64", "p.toml: [prompt]: there is no prompt text"),
        ("p.toml", '[prompts]\nprompt = "a"', "p.toml: prompts: unknown (did you mean 'prompt'?); prompts stand in"),
        ("p.toml", "[prompt.subset]\na = 1", "write [[prompt.subset]] with double brackets"),
        ("p.json", '["a", 5]', "p.json: prompt 2 must be a text or a table, got 5"),
        ("p.json", '{"prompt": "a"}', "must hold a list of prompts"),
        ("p.json", '[{"prompt": 5}]', "p.json: prompt 1: prompt must be a text in quotes, got 5"),
        ("p.txt", "# nothing\n", "holds no prompt"),
        ("p.md", "cat", "a prompt file must be .txt, .toml or .json"),
    ],
)
def test_bad_files_are_refused(write: Write, name: str, text: str, message: str) -> None:
    assert message in refusal(write(name, text))
