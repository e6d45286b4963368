"""The adapter layer: what it adds, when it adds nothing, and its dropouts."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.unit.lora.wan import seeded
from wanlora.lora.layers import LoRALinear
from wanlora.models.wan.layers import project


def layer(base: nn.Module | None = None, *, rank: int = 4, scale: float = 1.0, **dropouts: Any) -> LoRALinear:
    return LoRALinear(base or nn.Linear(6, 5), rank=rank, scale=scale, generator=seeded(), **dropouts)


def with_effect(adapter: LoRALinear) -> LoRALinear:
    nn.init.normal_(adapter.lora_up.weight, generator=seeded(1))
    return adapter


def samples(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=seeded(2))


def test_an_untrained_adapter_gives_the_bases_output() -> None:
    base, x = nn.Linear(6, 5), samples(2, 3, 6)
    assert torch.equal(layer(base)(x), base(x))


def test_multiplier_zero_gives_the_bases_output_bit_for_bit() -> None:
    adapter, x = with_effect(layer(nn.Linear(6, 5, dtype=torch.bfloat16))), samples(2, 3, 6).bfloat16()
    assert not torch.equal(adapter(x), adapter.base(x))
    adapter.multiplier = 0.0
    assert torch.equal(adapter(x), adapter.base(x))


@pytest.mark.parametrize("scale", [1.0, 0.25, 3.0])
@pytest.mark.parametrize("multiplier", [1.0, 0.5, -1.0])
def test_the_update_is_multiplier_times_scale_times_up_times_down(scale: float, multiplier: float) -> None:
    adapter, x = with_effect(layer(scale=scale)), samples(2, 3, 6)
    adapter.multiplier = multiplier
    delta = multiplier * scale * adapter.lora_up.weight @ adapter.lora_down.weight
    torch.testing.assert_close(adapter(x), adapter.base(x) + x @ delta.T)


def test_factors_stay_float32_and_the_output_has_the_bases_format() -> None:
    adapter = with_effect(layer(nn.Linear(6, 5, dtype=torch.bfloat16)))
    out = adapter(samples(2, 6).bfloat16())
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    for factor in (adapter.lora_down.weight, adapter.lora_up.weight):
        assert factor.dtype == torch.float32
        assert factor.grad is not None and factor.grad.dtype == torch.float32 and factor.grad.abs().sum() > 0


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_of_one_input_give_together_what_each_gives_alone(dtype: torch.dtype, dropout: float) -> None:
    sizes = ((5, 4, 1.0), (7, 2, 0.5), (5, 3, 3.0))
    layers = [
        with_effect(layer(nn.Linear(6, out, dtype=dtype), rank=rank, scale=scale, dropout=dropout))
        for out, rank, scale in sizes
    ]
    layers[1].multiplier = 0.0
    results = []
    for call in (LoRALinear.together, lambda x, them: [one(x) for one in them]):
        torch.manual_seed(4)
        x = samples(2, 3, 6).to(dtype).requires_grad_()
        outs = call(x, layers)
        trained = [p for one in (layers[0], layers[2]) for p in (one.lora_down.weight, one.lora_up.weight)]
        results.append([*outs, *torch.autograd.grad(torch.cat(list(outs), -1).float().square().sum(), [x, *trained])])
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for ours, alone in zip(*results, strict=True):
        torch.testing.assert_close(ours, alone, rtol=tolerance, atol=tolerance)


def test_layers_that_can_share_an_input_are_called_together(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    together = LoRALinear.together

    def counting(x: Tensor, layers: Sequence[LoRALinear]) -> tuple[Tensor, ...]:
        calls.append(len(layers))
        return together(x, layers)

    monkeypatch.setattr(LoRALinear, "together", staticmethod(counting))
    x, plain = samples(2, 6), nn.Linear(6, 5)
    project(x, [layer(), layer(), layer()])
    assert calls == [3]
    project(x, [layer(), plain])
    assert calls == [3, 1]


def test_any_module_with_sizes_is_a_base() -> None:
    class Doubling(nn.Module):
        in_features = out_features = 6

        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    x = samples(2, 6)
    assert torch.equal(layer(Doubling())(x), 2 * x)


def test_a_base_without_sizes_is_refused() -> None:
    with pytest.raises(TypeError, match="LayerNorm"):
        layer(nn.LayerNorm(6))


def test_an_adapter_is_no_base() -> None:
    with pytest.raises(TypeError, match="LoRALinear"):
        layer(layer())


def test_down_is_drawn_from_the_generator_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    base = nn.Linear(6, 5)
    torch.set_rng_state(before)
    first, second = layer(base), layer(base)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.lora_down.weight, second.lora_down.weight)


def test_down_is_uniform_within_one_over_root_in() -> None:
    adapter = layer(nn.Linear(400, 3), rank=50)
    bound = 1 / math.sqrt(400)
    drawn = adapter.lora_down.weight.detach()
    assert drawn.abs().max() <= bound
    assert float(drawn.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)


@pytest.mark.parametrize("kind", ["dropout", "rank_dropout"])
def test_dropout_keeps_the_mean_and_drops_the_share_it_is_told_to(kind: str) -> None:
    options: dict[str, Any] = {kind: 0.25}
    adapter = layer(nn.Linear(6, 5), rank=1, **options)
    nn.init.ones_(adapter.lora_up.weight)
    x = torch.ones(4000, 1, 6)
    torch.manual_seed(3)
    update = (adapter(x) - adapter.base(x))[..., 0].detach()
    full = adapter.lora_down.weight.sum().detach()
    assert float((update.abs() < 1e-6).float().mean()) == pytest.approx(0.25, abs=0.03)
    assert float(update.mean()) == pytest.approx(float(full), rel=0.05)


def test_rank_dropout_drops_a_rank_for_all_tokens_of_a_sample() -> None:
    adapter = layer(nn.Linear(6, 8), rank=8, rank_dropout=0.5)
    adapter.lora_up.weight.data.copy_(torch.eye(8))
    torch.manual_seed(0)
    x = samples(3, 5, 6)
    kept = (adapter(x) - adapter.base(x)).abs() > 1e-6
    assert torch.equal(kept, kept[:, :1].expand_as(kept))
    assert not torch.equal(kept[0], kept[1])


def test_module_dropout_drops_the_whole_update_and_leaves_no_gradient_out() -> None:
    adapter, x = with_effect(layer(module_dropout=0.5)), samples(2, 6)
    full = with_effect(layer(adapter.base))(x)
    torch.manual_seed(0)
    outs = [adapter(x) for _ in range(40)]
    dropped = [torch.equal(out, adapter.base(x)) for out in outs]
    assert 10 <= sum(dropped) <= 30
    for out, was_dropped in zip(outs, dropped, strict=True):
        assert was_dropped or torch.equal(out, full)
    outs[dropped.index(True)].sum().backward()
    assert adapter.lora_up.weight.grad is not None and not adapter.lora_up.weight.grad.any()


@pytest.mark.parametrize("kind", ["dropout", "rank_dropout", "module_dropout"])
def test_dropout_repeats_with_the_seed_and_rests_outside_training(kind: str) -> None:
    options: dict[str, Any] = {kind: 0.5}
    adapter, x = with_effect(layer(**options)), samples(4, 3, 6)
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        runs.append(torch.stack([adapter(x) for _ in range(8)]))
    assert torch.equal(runs[0], runs[1])
    assert not all(torch.equal(out, runs[0][0]) for out in runs[0])
    adapter.eval()
    assert torch.equal(adapter(x), with_effect(layer(adapter.base))(x))


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"dropout": 1.0}, {"rank_dropout": -0.1}, {"module_dropout": 2.0}])
def test_senseless_sizes_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        layer(**wrong)


def test_a_compiled_layer_is_one_graph_and_gives_the_same() -> None:
    adapter, x = with_effect(layer(scale=0.5, dropout=0.5, rank_dropout=0.5, module_dropout=0.5)), samples(2, 3, 6)
    compiled = torch.compile(adapter, backend="eager", fullgraph=True)
    outs = []
    for call in (compiled, adapter):
        torch.manual_seed(1)
        outs.append(torch.stack([call(x) for _ in range(6)]))
    assert torch.equal(outs[0], outs[1])
    adapter.multiplier = 0.0
    assert torch.equal(compiled(x), adapter.base(x))
