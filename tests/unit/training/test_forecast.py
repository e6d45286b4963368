"""What was foretold is held against the run, and said once."""

import logging
from dataclasses import replace

import pytest
import torch

from tests.unit.memory.adapters import adapter_parameters
from tests.unit.training.conftest import Checked
from wanlora.foundation.log import log
from wanlora.foundation.shapes import PixelShape
from wanlora.memory.checkpointing import Kept
from wanlora.memory.footprint import BlockMaths
from wanlora.memory.outlook import Outlook
from wanlora.memory.resting import WeightFormats
from wanlora.models.wan.spec import TASKS
from wanlora.training.forecast import Measured, PeakForecast, Size, TimeForecast, sizes_of_epoch

GIB = 2**30
SIZES = TASKS["t2v-14B"].sizes
OUTLOOK = Outlook(
    maths=BlockMaths(sizes=SIZES, fp8=True, rank=32),
    formats=WeightFormats(compute=torch.bfloat16, fp8=True),
    trained=40 * adapter_parameters(SIZES, 32),
    state_bytes=2.03,
)
PICTURE, CLIP = Size(PixelShape(768, 768), 1), Size(PixelShape(768, 416, 21), 1)
EPOCH = {PICTURE: 1, CLIP: 3}
Captured = pytest.LogCaptureFixture


@pytest.fixture(autouse=True)
def said(monkeypatch: pytest.MonkeyPatch, caplog: Captured) -> Captured:
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level(logging.INFO, logger="wanlora")
    return caplog


def step(size: Size, seconds: float = 1.0, *, off: float = 1.0, kept: int = 0, retried: bool = False) -> Measured:
    """A step whose peak is `off` times what is foretold."""
    peak = off * OUTLOOK.peak(size.load, Kept(kept)) / GIB
    return Measured(sizes=[size], seconds=seconds, peak=peak, kept=Kept(kept), retried=retried)


def test_the_largest_difference_is_said_once(said: Captured) -> None:
    forecast = PeakForecast(OUTLOOK, EPOCH)
    for measured in (step(CLIP, off=2), step(PICTURE, off=1.01), step(PICTURE, off=3)):
        forecast(measured, 9)
    assert said.text == ""
    for _ in range(3):
        forecast(step(CLIP, off=0.98, kept=5), 9)
    foretold = OUTLOOK.peak(CLIP.load, Kept(5)) / GIB
    assert said.text.count("foretold within 2.0%") == 1
    assert f"768x416x21, foretold {foretold:.1f} GiB, measured {0.98 * foretold:.1f}" in said.text
    assert len(said.records) == 1


@pytest.mark.parametrize(("streamed", "buffers"), [(12, 2), (12, 5), (12, 12), (0, 0)])
def test_what_a_step_really_streamed_and_kept_is_what_is_foretold(said: Captured, streamed: int, buffers: int) -> None:
    kept = Kept(0, attention=7)
    real = replace(OUTLOOK, swapped=streamed - buffers).peak(CLIP.load, kept) / GIB
    planned = replace(OUTLOOK, swapped=20, by_size={CLIP.load: 17, PICTURE.load: 3})
    forecast = PeakForecast(planned, {CLIP: 1})
    for _ in range(2):
        forecast(Measured(sizes=[CLIP], seconds=1.0, peak=real, kept=kept, streamed=streamed, buffers=buffers), 9)
    assert "within 0.0%" in said.text


def test_a_step_that_memory_did_not_suffice_for_at_first_is_not_compared(said: Captured) -> None:
    forecast = PeakForecast(OUTLOOK, {CLIP: 1})
    for _ in range(3):
        forecast(step(CLIP, off=1.2, retried=True), 9)
    assert said.text == ""
    forecast(step(CLIP), 9)
    assert "within 0.0%" in said.text


def test_a_run_that_dropped_its_transposed_weights_is_foretold_without_them(said: Captured) -> None:
    forecast = PeakForecast(replace(OUTLOOK, transposed=True), {CLIP: 1})
    for _ in range(2):
        forecast(step(CLIP), 9)
    assert "within 0.0%" in said.text


def test_steps_that_say_nothing_about_one_size_are_left_out(said: Captured) -> None:
    forecast = PeakForecast(OUTLOOK, {CLIP: 1})
    forecast(step(CLIP), 9)
    forecast(Measured(sizes=[CLIP, CLIP], seconds=1.0, peak=30.0), 9)
    forecast(Measured(sizes=[CLIP], seconds=1.0), 9)
    assert said.text == ""
    forecast(step(CLIP), 9)
    assert "within 0.0%" in said.text


def test_what_is_left_is_told_when_the_usual_sizes_are_known(said: Captured) -> None:
    forecast = TimeForecast({**EPOCH, Size(PixelShape(64, 64), 1): 0})
    for seconds, size in ((9, PICTURE), (1, PICTURE), (1, PICTURE), (9, CLIP), (2, CLIP)):
        forecast(step(size, seconds), 1000)
    assert said.text == ""
    forecast(step(CLIP, 2), 1000)
    forecast(step(CLIP, 2), 999)
    assert said.messages == ["a step takes 1.75 s on average, what is left takes about 29 min"]


def test_a_rare_size_is_not_waited_for(said: Captured) -> None:
    forecast = TimeForecast({CLIP: 19, PICTURE: 1})
    for _ in range(3):
        forecast(step(CLIP, 2), 1000)
    assert "a step takes 2.00 s" in said.text


def test_steps_on_several_batches_are_told_by_their_median(said: Captured) -> None:
    forecast = TimeForecast(EPOCH)
    for number in range(25):
        forecast(Measured(sizes=[CLIP, PICTURE], seconds=50.0 if number == 0 else 4.0), 100)
    assert said.messages == ["a step takes 4.00 s on average, what is left takes about 7 min"]


def test_nothing_is_told_at_the_end(said: Captured) -> None:
    forecast = TimeForecast({CLIP: 1})
    for _ in range(5):
        forecast(step(CLIP), 0)
    assert said.text == ""


def test_sizes_are_those_of_the_batches(checked: Checked) -> None:
    _, prepared = checked()
    assert sizes_of_epoch(prepared.plan) == {
        Size(PixelShape(48, 32), 2): 1,
        Size(PixelShape(48, 32), 1): 1,
        Size(PixelShape(32, 32), 1): 3,
        Size(PixelShape(32, 32, 5), 1): 3,
    }
    assert str(Size(PixelShape(48, 32), 2)) == "48x32x1 x 2"
