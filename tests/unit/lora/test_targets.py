"""Which modules are adapted."""

import logging

import pytest
import torch

from tests.unit.lora.wan import adapted_wan, tiny_wan
from wanlora.foundation.errors import ConfigError
from wanlora.lora.targets import candidates, is_partial, select_targets
from wanlora.models.wan.spec import WanSizes
from wanlora.models.wan.transformer import WanTransformer


@pytest.mark.parametrize(
    ("sizes", "count"),
    [
        (WanSizes(dim=1536, ffn_dim=8960, num_layers=30), 300),
        (WanSizes(dim=5120, ffn_dim=13824, num_layers=40), 400),
    ],
)
def test_released_models_have_as_many_targets_as_in_musubi(sizes: WanSizes, count: int) -> None:
    with torch.device("meta"):
        model = WanTransformer(sizes)
    assert len(select_targets(model)) == count


def test_every_block_offers_its_ten_linear_layers() -> None:
    attention = [f"{kind}_attn.{part}" for kind in ("self", "cross") for part in "qkvo"]
    assert candidates(tiny_wan()) == tuple(
        f"blocks.{block}.{tail}" for block in (0, 1) for tail in (*attention, "ffn.0", "ffn.2")
    )


def test_an_adapted_model_offers_the_same_candidates() -> None:
    assert candidates(adapted_wan().model) == candidates(tiny_wan())


def test_include_patterns_restrict() -> None:
    assert set(select_targets(tiny_wan(), include=[r".*self_attn\.[qk]$"])) == {
        f"blocks.{block}.self_attn.{part}" for block in (0, 1) for part in "qk"
    }


def test_exclude_patterns_remove() -> None:
    targets = select_targets(tiny_wan(), exclude=[r"blocks\.0\.", ".*ffn"])
    assert targets == tuple(f"blocks.1.{kind}_attn.{part}" for kind in ("self", "cross") for part in "qkvo")


def test_exclusion_wins_over_inclusion_and_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "wanlora"):
        targets = select_targets(tiny_wan(), include=[".*ffn"], exclude=[r"blocks\.1\."])
    assert targets == ("blocks.0.ffn.0", "blocks.0.ffn.2")
    assert "2 modules match both" in caplog.text


def test_a_selection_is_partial_and_the_whole_is_not() -> None:
    model = tiny_wan()
    assert is_partial(model, select_targets(model, include=[".*ffn"]))
    assert not is_partial(model, select_targets(model))


@pytest.mark.parametrize(
    ("pattern", "advice"),
    [
        ("self_attn", r"write '\.\*self_attn'"),
        (r".*self_atn\.q", r"Near it: 'self_attn\.q'"),
        (r".*single_blocks.*", r"there are: cross_attn\.k"),
        ("([", "not a regular expression"),
    ],
)
def test_a_pattern_that_cannot_act_is_an_error_with_advice(pattern: str, advice: str) -> None:
    for option in ("include", "exclude"):
        with pytest.raises(ConfigError, match=advice) as caught:
            select_targets(tiny_wan(), **{option: [pattern]})
        assert f"{option}_patterns" in str(caught.value)


def test_all_wrong_patterns_are_listed_at_once() -> None:
    with pytest.raises(ConfigError, match=r"2 problems(.|\n)*nothing_a(.|\n)*nothing_b"):
        select_targets(tiny_wan(), include=["nothing_a"], exclude=["nothing_b"])


def test_nothing_left_is_an_error() -> None:
    with pytest.raises(ConfigError, match="leave no module"):
        select_targets(tiny_wan(), include=[".*ffn"], exclude=[".*"])
