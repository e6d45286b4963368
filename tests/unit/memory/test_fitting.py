"""How much of a clip the autoencoder computes at once, on cards with little memory that are simulated."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from wanlora.foundation.log import log
from wanlora.foundation.shapes import PixelShape
from wanlora.memory.fitting import FittedVAE
from wanlora.memory.tiling import decoding_ways, encoding_ways
from wanlora.models.wan.vae import VAESizes, WanVAE
from wanlora.models.wan.vae_tiles import WHOLE, Tiling

MIB = 2**20
CLIP = PixelShape(160, 128, 5)


class Watched:
    """Notes how it is called and picks numbers out of what it gets; breaks where it is told to."""

    sizes = VAESizes(base=8, z=4)
    device, dtype = torch.device("cpu"), torch.float32
    usual_chunk = WanVAE.usual_chunk

    def __init__(self) -> None:
        self.calls: list[tuple[int, int | None, Tiling]] = []
        self.breaks: Callable[[Tiling], bool] = lambda tiling: False
        self.error: Exception = torch.OutOfMemoryError("CUDA out of memory")

    def encode(self, pixels_BCFHW: Tensor, *, chunk: int | None = None, tiling: Tiling = WHOLE) -> Tensor:
        self._note(len(pixels_BCFHW), chunk, tiling)
        return pixels_BCFHW[:, :, ::4, ::8, ::8].float()

    def decode(self, latents_BCFHW: Tensor, *, tiling: Tiling = WHOLE) -> Tensor:
        self._note(len(latents_BCFHW), None, tiling)
        return latents_BCFHW[:, :3].repeat_interleave(8, 3).repeat_interleave(8, 4)

    def _note(self, clips: int, chunk: int | None, tiling: Tiling) -> None:
        self.calls.append((clips, chunk, tiling))
        if self.breaks(tiling):
            raise self.error


@pytest.fixture
def vae() -> Any:
    return Watched()


@pytest.fixture(autouse=True)
def heard(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level(logging.INFO, logger="wanlora")
    yield


@pytest.fixture
def pixels() -> Tensor:
    return torch.randint(0, 256, (2, 3, 5, 128, 160), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def room_of(size: int | None) -> Any:
    return lambda device: size


def needs(vae: Any, **wanted: Any) -> int:
    """What the way with these properties takes."""
    ways = encoding_ways(vae, CLIP, 2)
    return next(way.needs for way in ways if all(getattr(way, name) == value for name, value in wanted.items()))


@pytest.mark.parametrize("room", [None, 2**40])
def test_what_fits_is_computed_as_it_comes(
    vae: Any, pixels: Tensor, room: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    fitted = FittedVAE(vae, room=room_of(room))
    assert torch.equal(fitted.encode(pixels), pixels[:, :, ::4, ::8, ::8].float())
    fitted.decode(torch.randn(1, 4, 2, 16, 20))
    assert vae.calls == [(2, None, WHOLE), (1, None, WHOLE)]
    assert caplog.messages == []


def test_less_is_computed_at_once_as_memory_gets_scarcer(vae: Any, pixels: Tensor) -> None:
    expected = vae.encode(pixels)
    rooms = {
        needs(vae): [(2, None, WHOLE)],
        needs(vae) - 1: [(1, None, WHOLE)] * 2,
        needs(vae, by_clip=True) - 1: [(1, 1, WHOLE)] * 2,
        needs(vae, chunk=1) - 1: [(1, 1, Tiling(1, 2))] * 2,
        0: [(1, 1, Tiling(2, 2))] * 2,
    }
    for room, calls in rooms.items():
        vae.calls.clear()
        assert torch.equal(FittedVAE(vae, room=room_of(room)).encode(pixels), expected)
        assert vae.calls == calls


def test_tiles_are_said_once_for_each_size(vae: Any, pixels: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    fitted = FittedVAE(vae, room=room_of(0))
    for _ in range(2):
        fitted.encode(pixels)
        fitted.decode(torch.randn(1, 4, 2, 16, 20))
    fitted.encode(pixels[..., :128])
    assert [message.partition(" (else")[0] for message in caplog.messages] == [
        "160x128x5 is encoded in 4 tiles (2x2) of 80x64 and what lies around them",
        "160x128x5 is decoded in 4 tiles (2x2) of 80x64 and what lies around them",
        "128x128x5 is encoded in 4 tiles (2x2) of 64x64 and what lies around them",
    ]
    assert "else it would take 0.0 GiB, 0.0 are free" in caplog.text


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("out"), RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")]
)
def test_memory_that_runs_out_leads_to_tiles_and_is_remembered(
    vae: Any, pixels: Tensor, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    expected = vae.encode(pixels)
    vae.error, vae.breaks = error, lambda tiling: tiling.is_whole
    vae.calls.clear()
    fitted = FittedVAE(vae, room=room_of(2**40))
    assert torch.equal(fitted.encode(pixels), expected)
    assert (vae.calls[0], vae.calls[-1]) == ((2, None, WHOLE), (1, 1, Tiling(2, 2)))
    tried = len(vae.calls)
    fitted.encode(pixels)
    assert vae.calls[tried:] == [(1, 1, Tiling(2, 2))] * 2
    assert sum("memory ran out while 160x128x5 was encoded" in message for message in caplog.messages) == tried - 2
    assert "in 4 tiles (2x2) of 80x64 and what lies around them (memory ran out)" in caplog.text


def test_decoding_that_runs_out_of_memory_goes_on_in_tiles(vae: Any) -> None:
    latents = torch.randn(1, 4, 2, 16, 20, generator=torch.Generator().manual_seed(0))
    expected = vae.decode(latents)
    vae.breaks = lambda tiling: tiling.is_whole
    fitted = FittedVAE(vae, room=room_of(2**40))
    assert torch.equal(fitted.decode(latents), expected)
    usual = next(decoding_ways(CLIP, sizes=vae.sizes, itemsize=4))
    way = next(way for way in decoding_ways(CLIP, sizes=vae.sizes, itemsize=4) if way.needs <= 0.75 * usual.needs)
    assert vae.calls[-1] == (1, None, way.tiling)


def test_what_fits_in_no_way_is_an_error(vae: Any, pixels: Tensor) -> None:
    vae.breaks = lambda tiling: True
    with pytest.raises(torch.OutOfMemoryError):
        FittedVAE(vae, room=room_of(2**40)).encode(pixels)
    assert vae.calls[-1] == (1, 1, Tiling(2, 2))


def test_other_errors_are_not_taken_for_memory(vae: Any, pixels: Tensor) -> None:
    vae.error, vae.breaks = RuntimeError("something else"), lambda tiling: True
    with pytest.raises(RuntimeError, match="something else"):
        FittedVAE(vae, room=room_of(2**40)).encode(pixels)
    assert len(vae.calls) == 1


@pytest.mark.parametrize(("tiling", "room"), [("off", 0), ("auto", None)])
def test_tiles_that_are_off_or_on_a_processor_are_not_tried(
    vae: Any, pixels: Tensor, tiling: Any, room: int | None
) -> None:
    vae.breaks = lambda tiling: True
    with pytest.raises(torch.OutOfMemoryError):
        FittedVAE(vae, tiling=tiling, room=room_of(room)).encode(pixels)
    assert vae.calls == [(2, None, WHOLE)]


@pytest.mark.parametrize("room", [None, 2**40])
def test_tiles_that_are_asked_for_are_few(
    vae: Any, pixels: Tensor, room: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    fitted = FittedVAE(vae, tiling="on", room=room_of(room))
    fitted.encode(pixels)
    fitted.encode(pixels[..., :64, :64])
    assert vae.calls == [(1, 1, Tiling(1, 2))] * 2 + [(2, None, WHOLE)]
    assert caplog.messages == [
        "160x128x5 is encoded in 2 tiles (2x1) of 80x128 and what lies around them (--vae_tiling on); up to rounding "
        "the result is the same",
        "--vae_tiling on: 64x64x5 is too small for tiles",
    ]
