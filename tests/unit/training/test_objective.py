"""The loss, and which noise a batch gets."""

import pytest
import torch
from einops import rearrange

from tests.unit.training.parts import Velocity, batch, noise, objective


def test_the_loss_is_the_weighted_mean_square_of_the_velocity_error() -> None:
    model, made, data = Velocity(), noise((1, 2)), batch(1, size=2)
    drawn = made(data.latents_BCFHW, 0, 1)
    t = rearrange(drawn.t_B, "b -> b 1 1 1 1")
    x_t = (1 - t) * data.latents_BCFHW + t * drawn.noise_BCFHW
    towards = torch.stack([text.mean() for text in data.text]) + drawn.t_B
    predicted = torch.einsum("dc,bcfhw->bdfhw", model.mix, x_t) + rearrange(towards, "b -> b 1 1 1 1")
    errors = ((predicted - (drawn.noise_BCFHW - data.latents_BCFHW)) ** 2).flatten(1).mean(1)
    weights = 2 / (torch.pi * (1 - 2 * drawn.t_B + 2 * drawn.t_B**2))
    loss = objective(model, made, "cosmap")(data, 0, 1)
    torch.testing.assert_close(loss.value, (errors * weights).mean())
    assert torch.equal(loss.t_B, drawn.t_B)


def test_latents_in_bfloat16_are_noised_in_float32() -> None:
    data, model = batch(0), Velocity()
    object.__setattr__(data, "latents_BCFHW", data.latents_BCFHW.bfloat16())
    loss = objective(model)(data, 0, 0).value
    object.__setattr__(data, "latents_BCFHW", data.latents_BCFHW.float())
    assert loss.dtype is torch.float32
    assert torch.equal(loss, objective(model)(data, 0, 0).value)


def test_noise_does_not_depend_on_the_order_of_calls_nor_on_global_randomness() -> None:
    places = [(epoch, index) for epoch in (0, 1) for index in (0, 5, 3)]
    latents = batch(0).latents_BCFHW
    forwards = noise()
    one = {place: forwards(latents, *place) for place in places}
    torch.manual_seed(99)
    backwards = noise()
    other = {place: backwards(latents, *place) for place in reversed(places)}
    for place in places:
        assert torch.equal(one[place].noise_BCFHW, other[place].noise_BCFHW)
        assert torch.equal(one[place].t_B, other[place].t_B)
    for numbers in ([float(drawn.t_B) for drawn in one.values()], [drawn.noise_BCFHW.sum() for drawn in one.values()]):
        assert len(set(map(float, numbers))) == len(places)


def test_another_seed_gives_other_noise() -> None:
    latents = batch(0).latents_BCFHW
    assert not torch.equal(noise(seed=1)(latents, 0, 0).noise_BCFHW, noise(seed=2)(latents, 0, 0).noise_BCFHW)


@pytest.mark.parametrize("sizes", [(1,) * 12, (4, 1, 1, 2, 3, 1), (5, 5, 2)])
def test_an_epochs_noise_levels_fill_all_buckets_alike(sizes: tuple[int, ...]) -> None:
    made = noise(sizes, num_timestep_buckets=4)
    for epoch in range(3):
        levels = torch.cat([made(batch(i, size=n).latents_BCFHW, epoch, i).t_B for i, n in enumerate(sizes)])
        counts = torch.histc(levels, bins=4, min=0, max=1)
        assert counts.tolist() == [3, 3, 3, 3]


def test_every_sample_of_a_batch_has_its_own_noise() -> None:
    drawn = noise((3,))(batch(0, size=3).latents_BCFHW, 0, 0)
    assert len(set(drawn.t_B.tolist())) == 3
    assert not torch.equal(drawn.noise_BCFHW[0], drawn.noise_BCFHW[1])
