"""`key=value` lists, network arguments and "steps or share"."""

import json
from pathlib import Path
from typing import Any

import pytest

from wanlora.config.values import NetworkArgs, parse_key_values, parse_network_args, ratio_or_steps
from wanlora.foundation.errors import ConfigError

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "musubi-golden.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("text", "value"), GOLDEN["int_or_float"].items())
def test_steps_and_shares_read_as_in_musubi(text: str, value: float) -> None:
    found = ratio_or_steps(text)
    assert found == value and type(found) is type(value)


def test_a_text_that_is_no_number_of_steps_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be a number of steps, .* or 10%, got 'ten'"):
        ratio_or_steps("ten")


@pytest.mark.parametrize(
    ("item", "value"),
    [
        ("k=1", 1),
        ("k=1e-2", 0.01),
        ("k=0.9,0.99", (0.9, 0.99)),
        ("k=True", True),
        ("k=false", False),
        ("k=None", None),
        ("k=fast", "fast"),
        ("k='a=b'", "a=b"),
        ("k=['.*a.*','(?=b)']", [".*a.*", "(?=b)"]),
        (" k = 1 ", 1),
    ],
)
def test_values_are_python_literals_or_words(item: str, value: Any) -> None:
    assert parse_key_values([item], "--optimizer_args") == {"k": value}


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["a=b=c"], "'a=b=c' has two '='"),
        (["betas"], "'betas' is not key=value"),
        (["k="], "'k=' is not key=value"),
        (["=1"], "'=1' is not key=value"),
        (["weight decay=1"], "'weight decay=1' is not key=value"),
        (["k=['a'"], "is not a Python value; a list is written"),
        (["k=1", "k=2"], "k is given twice"),
    ],
)
def test_what_is_no_key_value_pair_is_refused(items: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_key_values(items, "--optimizer_args")
    assert str(caught.value).startswith("--optimizer_args: ") and message in str(caught.value)


def test_every_bad_item_is_named() -> None:
    with pytest.raises(ConfigError, match="2 problems"):
        parse_key_values(["a=b=c", "d"], "--optimizer_args")


def test_network_arguments_are_typed() -> None:
    patterns = ["exclude_patterns=['.*ffn.*']", "include_patterns=.*self.*"]
    args = parse_network_args([*patterns, "rank_dropout=0", "loraplus_lr_ratio=4", "verbose=True"])
    assert args.exclude_patterns == (".*ffn.*",) and args.include_patterns == (".*self.*",)
    assert (args.rank_dropout, args.module_dropout, args.loraplus_lr_ratio) == (0.0, None, 4.0) and args.verbose
    assert parse_network_args([]) == NetworkArgs()


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("rank_dropuot=0.1", "unknown key 'rank_dropuot' (did you mean 'rank_dropout'?)"),
        ("rank_dropout=1", "rank_dropout must be at least 0 and below 1, got 1"),
        ("module_dropout=-0.1", "module_dropout must be at least 0 and below 1"),
        ("rank_dropout=some", "rank_dropout must be a number, got 'some'"),
        ("loraplus_lr_ratio=0", "loraplus_lr_ratio must be above 0"),
        ("verbose=loud", "verbose must be True or False, got 'loud'"),
        ("exclude_patterns=[1]", "exclude_patterns must be a list of regular expressions"),
        ("exclude_patterns=['(']", "'(' is not a regular expression"),
    ],
)
def test_a_bad_network_argument_is_refused(item: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_network_args([item])
    assert message in str(caught.value)


def test_convolution_arguments_are_said_to_change_nothing(said: list[str]) -> None:
    assert parse_network_args(["conv_dim=4", "conv_alpha=1"]) == NetworkArgs()
    assert [message.split(":")[1] for message in said] == [" conv_dim changes nothing", " conv_alpha changes nothing"]
