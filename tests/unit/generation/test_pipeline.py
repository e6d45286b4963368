"""The sampling loop: what it computes, what it leaves behind."""

import gc
import random
import weakref
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from wanlora.foundation.errors import ConfigError, UserError
from wanlora.foundation.shapes import LatentShape
from wanlora.generation.pipeline import decode_frames, initial_noise, sample_latents

LATENT = LatentShape(2, 4, 6)
TEXT, NEGATIVE = torch.full((3, 5), 2.0), torch.full((2, 5), -1.0)


class Answering(nn.Module):
    """A velocity that depends on state, time and text; remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Dropout(0.5)
        self.trained = nn.Dropout(0.5)
        self.asked: list[tuple[float, float]] = []
        self.seen: list[weakref.ref[Tensor]] = []
        self.had_grad = False

    def forward(self, x_BCFHW: Tensor, timestep_B: Tensor, text: list[Tensor]) -> Tensor:
        assert timestep_B.shape == (1,)
        self.asked.append((timestep_B.item(), text[0].mean().item()))
        self.seen.append(weakref.ref(x_BCFHW))
        self.had_grad |= torch.is_grad_enabled()
        x = self.trained(x_BCFHW)
        return torch.tanh(x) * text[0].mean() + timestep_B.item() / 1000


def _sample(model: Answering, negative: Tensor | None = NEGATIVE, **changes: object) -> Tensor:
    settings: dict[str, object] = {
        "latent": LATENT,
        "steps": 3,
        "shift": 3.0,
        "guidance": 2.0,
        "solver": "euler",
        "seed": 5,
        "device": "cpu",
    }
    return sample_latents(model, TEXT, negative, **(settings | changes))  # type: ignore[arg-type]


def test_the_loop_equals_one_written_by_hand() -> None:
    x = torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(5))
    sigmas = [3 * s / (1 + 2 * s) for s in (1, 2 / 3, 1 / 3, 0)]
    for now, then in pairwise(sigmas):
        towards, away = (torch.tanh(x) * strength + int(1000 * now) / 1000 for strength in (2.0, -1.0))
        x = x + (then - now) * (away + 2.0 * (towards - away))
    latents = _sample(Answering())
    assert latents.dtype == torch.float32
    torch.testing.assert_close(latents, x[0], atol=1e-5, rtol=0)


def test_a_step_asks_with_the_text_and_then_without() -> None:
    model = Answering()
    _sample(model, solver="unipc", shift=5.0, steps=2)
    assert model.asked == [(999, 2), (999, -1), (833, 2), (833, -1)]


@pytest.mark.parametrize(("negative", "guidance"), [(NEGATIVE, 1.0), (None, 5.0)])
def test_without_guidance_there_is_one_forward_a_step(negative: Tensor | None, guidance: float) -> None:
    model = Answering()
    _sample(model, negative, guidance=guidance)
    assert [text for _, text in model.asked] == [2, 2, 2]


def test_the_seed_decides() -> None:
    assert torch.equal(_sample(Answering()), _sample(Answering()))
    assert not torch.equal(_sample(Answering()), _sample(Answering(), seed=6))
    assert initial_noise(LATENT, 3, channels=4).shape == (1, 4, 2, 4, 6)


def test_global_generators_are_left_alone() -> None:
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    _sample(Answering())
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state[1])  # type: ignore[index]
    assert random.getstate() == python_state


def test_every_module_returns_to_its_mode() -> None:
    model = Answering().train()
    model.frozen.eval()
    _sample(model)
    assert model.training
    assert model.trained.training
    assert not model.frozen.training


def test_modes_return_after_a_failure_too() -> None:
    model = Answering().train()
    with pytest.raises(RuntimeError):
        sample_latents(
            model,
            TEXT,
            NEGATIVE,
            latent=LATENT,
            steps=1,
            shift=1.0,
            guidance=1.0,
            seed=0,
            device="cpu",
            progress=_failing,
        )
    assert model.training


def _failing(done: int, total: int) -> None:
    raise RuntimeError("stop")


def test_no_graph_is_recorded() -> None:
    model = Answering()
    assert not _sample(model).requires_grad
    assert not model.had_grad
    assert torch.is_grad_enabled()


def test_tensors_that_a_model_keeps_serve_training_afterwards() -> None:
    class Keeping(nn.Module):
        table: Tensor | None = None

        def forward(self, x_BCFHW: Tensor, timestep_B: Tensor, text: list[Tensor]) -> Tensor:
            if self.table is None:
                self.table = torch.linspace(0, 1, x_BCFHW.shape[-1])
            return x_BCFHW * self.table

    model = Keeping()
    sample_latents(model, TEXT, None, latent=LATENT, steps=1, shift=1.0, guidance=1.0, seed=0, device="cpu")
    x = torch.ones(1, 16, 2, 4, 6, requires_grad=True)
    model(x, torch.ones(1), [TEXT]).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler"])
def test_nothing_of_a_run_stays_in_memory(solver: str) -> None:
    model = Answering()
    gc.disable()
    try:
        latents = _sample(model, solver=solver)
        last = weakref.ref(latents)
        del latents
        assert [state() for state in model.seen] == [None] * 6
        assert last() is None
    finally:
        gc.enable()


def test_progress_counts_to_the_end() -> None:
    told: list[tuple[int, int]] = []
    _sample(Answering(), progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_values_that_break_down_are_reported_with_their_step() -> None:
    def breaking(x_BCFHW: Tensor, timestep_B: Tensor, text: list[Tensor]) -> Tensor:
        return x_BCFHW * (float("nan") if timestep_B.item() < 700 else 1.0)

    with pytest.raises(UserError, match=r"NaN or infinite values at step 3 of 4 \(timestep 500, seed 9\)"):
        sample_latents(
            breaking, TEXT, None, latent=LATENT, steps=4, shift=1.0, guidance=1.0, solver="euler", seed=9, device="cpu"
        )


def test_an_unknown_solver_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'unipc'"):
        _sample(Answering(), solver="unipcc")


class Stretching:
    """A decoder that repeats cells; shows black, mid grey and white for -1, 0 and 1 or beyond."""

    def decode(self, latents_BCFHW: Tensor) -> Tensor:
        return latents_BCFHW[:, :3].repeat_interleave(8, 3).repeat_interleave(8, 4)


def test_decoded_frames_are_bytes_with_colours_last() -> None:
    latents = torch.zeros(4, 2, 3, 5)
    latents[0], latents[1], latents[2] = -1.0, 0.0, 1.0
    frames = decode_frames(Stretching(), latents)
    assert frames.shape == (2, 24, 40, 3)
    assert frames.dtype == np.uint8
    assert frames[1, 7, 9].tolist() == [0, 128, 255]


def test_every_byte_is_used() -> None:
    ramp = torch.linspace(-1, 1, 256).reshape(1, 1, 1, 256).expand(3, -1, -1, -1)
    assert decode_frames(Stretching(), ramp)[0, 0, ::8, 0].tolist() == list(range(256))
    assert decode_frames(Stretching(), ramp.bfloat16())[0, 0, -1, 0] == 255


def test_pixels_that_are_not_finite_are_reported() -> None:
    with pytest.raises(UserError, match="decoding by the VAE"):
        decode_frames(Stretching(), torch.full((4, 1, 2, 2), float("inf")))
