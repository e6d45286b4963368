"""What previews are foretold to take, against what the decoder is counted to hold."""

import pytest
import torch
from torch import Tensor, nn

from tests.held import Held
from tests.tiny import TinyWan
from wanlora.foundation.shapes import LatentShape, PixelShape
from wanlora.foundation.tensor_files import TensorSource, open_tensors
from wanlora.memory.footprint import BlockMaths
from wanlora.memory.previews import decoder_bytes, sampling_bytes, text_encoder_bytes
from wanlora.models.wan.spec import TASKS
from wanlora.models.wan.umt5 import load_umt5
from wanlora.models.wan.vae import WanVAE


class _Header(TensorSource):
    """A model's shapes as a file would have them."""

    def __init__(self, model: nn.Module) -> None:
        self.shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self.names = tuple(self.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return torch.bfloat16

    def read(self, name: str) -> Tensor:
        raise AssertionError("a plan reads no tensor")

    def close(self) -> None:
        pass


@pytest.mark.parametrize("pixels", [PixelShape(384, 256, 13), PixelShape(512, 512)], ids=str)
def test_decoding_holds_about_what_is_foretold(pixels: PixelShape) -> None:
    with torch.device("meta"):
        vae = WanVAE()
        latent = LatentShape.of(pixels)
        latents = torch.empty(1, 16, latent.frames, latent.height, latent.width)
    weights = sum(parameter.numel() for parameter in vae.parameters())
    with Held() as held:
        vae.decode(latents)
    foretold = decoder_bytes(_Header(vae), pixels, itemsize=4)
    assert foretold == pytest.approx(held.most + 4 * weights, rel=0.3)


def test_frames_that_may_be_cut_are_foretold_to_take_a_few_tiles() -> None:
    pixels = PixelShape(832, 480, 81)
    with torch.device("meta"):
        header = _Header(WanVAE())
    weights = 4 * sum(torch.Size(shape).numel() for shape in header.shapes.values())
    whole, tiled = (decoder_bytes(header, pixels, itemsize=4, tiled=tiled) - weights for tiled in (False, True))
    assert 0.1 * whole < tiled < 0.2 * whole


@pytest.mark.parametrize("fp8", [True, False])
def test_the_text_encoder_weighs_what_its_tensors_do(fp8: bool, tiny_models: TinyWan) -> None:
    encoder = load_umt5(tiny_models.t5, device="cpu", fp8=fp8)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in encoder.parameters())
    with open_tensors(tiny_models.t5) as source:
        foretold = text_encoder_bytes(source, fp8=fp8)
    assert foretold - 300 * 2**20 == pytest.approx(weights, rel=0.05)


def test_sampling_grows_with_the_clip() -> None:
    maths = BlockMaths(sizes=TASKS["t2v-14B"].sizes)
    clip, picture = (sampling_bytes(maths, PixelShape(832, 480, frames)) for frames in (81, 1))
    assert clip == 21 * picture > 2 * 2**30


def test_half_as_wide_numbers_take_half_the_memory() -> None:
    with torch.device("meta"):
        header = _Header(WanVAE())
    pixels = PixelShape(64, 64)
    assert decoder_bytes(header, pixels, itemsize=2) * 2 == decoder_bytes(header, pixels, itemsize=4)
