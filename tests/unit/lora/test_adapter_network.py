"""All adapters of a model together."""

import logging

import pytest
import torch
from torch import Tensor

from tests.unit.lora.wan import adapted_wan, inputs, seeded, tiny_wan
from wanlora.foundation.errors import CheckpointError
from wanlora.lora.drawing import drawing_downs
from wanlora.lora.layers import LoRALinear
from wanlora.lora.network import LoRANetwork, eject, inject
from wanlora.lora.targets import select_targets
from wanlora.lora.weights import LoRAWeights
from wanlora.quantization.linear import Fp8Linear


def snapshot(network: LoRANetwork) -> dict[str, LoRAWeights]:
    """Copies of the weights, as a file would give them."""
    return {name: LoRAWeights(w.down.clone(), w.up.clone(), w.alpha) for name, w in network.weights().items()}


def loss(out: Tensor) -> Tensor:
    return out.square().mean()


def test_injecting_changes_no_output() -> None:
    model = tiny_wan()
    before = model(*inputs())
    inject(model, select_targets(model), rank=4, generator=seeded())
    assert torch.equal(model(*inputs()), before)


def test_ejecting_undoes_injecting() -> None:
    model = tiny_wan()
    modules, tensors = dict(model.named_modules()), dict(model.state_dict())
    network = inject(model, select_targets(model), rank=4, generator=seeded())
    assert any(isinstance(module, LoRALinear) for module in model.modules())
    assert eject(network) is model
    assert list(model.named_modules()) == list(modules.items())
    after = model.state_dict()
    assert list(after) == list(tensors)
    assert all(after[name].data_ptr() == tensors[name].data_ptr() for name in tensors)


def test_factors_drawn_ahead_are_those_that_injecting_draws() -> None:
    targets = select_targets(tiny_wan())
    ranks = {name: 2 + number % 3 for number, name in enumerate(targets)}
    usual = inject(tiny_wan(), targets, rank=ranks, generator=seeded(5))
    shapes = {name: (adapter.rank, adapter.in_features) for name, adapter in usual.adapters.items()}
    downs, unused = drawing_downs(shapes, seeded(5)).result(), seeded(9)
    ahead = inject(tiny_wan(), targets, rank=ranks, generator=unused, downs=downs)
    before, after = usual.state_dict(), ahead.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(unused.get_state(), seeded(9).get_state())


def test_what_goes_wrong_while_drawing_is_raised_where_the_factors_are_wanted() -> None:
    with pytest.raises(RuntimeError):
        drawing_downs({"a": (-1, 4)}, seeded()).result()


def test_injecting_or_ejecting_twice_is_an_error() -> None:
    network = adapted_wan()
    with pytest.raises(ValueError, match="has adapters already"):
        inject(network.model, ["blocks.0.ffn.0"], rank=4, generator=seeded())
    eject(network)
    with pytest.raises(ValueError, match="ejected before"):
        eject(network)


def test_only_adapters_are_trained() -> None:
    network = adapted_wan()
    loss(network.model(*inputs())).backward()
    own = {id(parameter) for parameter in network.parameters()}
    for parameter in network.model.parameters():
        assert parameter.requires_grad == (id(parameter) in own)
        assert (parameter.grad is not None) == (id(parameter) in own)
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in network.parameters())
    assert network.num_parameters == sum(4 * (a.in_features + a.out_features) for a in network.adapters.values())


def test_the_same_generator_seed_gives_the_same_adapters() -> None:
    first, second, other = adapted_wan(), adapted_wan(), adapted_wan(seed=5)
    same = zip(first.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in same)
    assert not torch.equal(first.parameters()[0], other.parameters()[0])


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (0, 1.0), (4, 1.0), (1, 0.25), (8, 2.0)])
def test_scale_is_alpha_over_rank_and_no_alpha_means_rank(alpha: float | None, scale: float) -> None:
    network = adapted_wan(rank=4, alpha=alpha)
    assert {adapter.scale for adapter in network.adapters.values()} == {scale}


def test_rank_and_alpha_may_differ_by_module() -> None:
    model = tiny_wan()
    targets = ("blocks.0.ffn.0", "blocks.1.ffn.2")
    ranks, alphas = dict(zip(targets, (2, 3), strict=True)), dict.fromkeys(targets, 6.0)
    network = inject(model, targets, rank=ranks, alpha=alphas, generator=seeded())
    assert [(a.rank, a.scale) for a in network.adapters.values()] == [(2, 3.0), (3, 2.0)]


def test_options_reach_every_layer() -> None:
    model = tiny_wan()
    network = inject(
        model, select_targets(model), rank=4, generator=seeded(), dropout=0.1, rank_dropout=0.2, module_dropout=0.3
    )
    for adapter in network.adapters.values():
        assert (adapter.dropout, adapter.rank_dropout, adapter.module_dropout) == (0.1, 0.2, 0.3)
    network.train(False)
    assert not any(adapter.training for adapter in network.adapters.values())
    network.train()
    assert all(adapter.training for adapter in network.adapters.values())


def test_disabled_adapters_leave_the_base_bit_for_bit_and_come_back() -> None:
    base = tiny_wan()(*inputs())
    network = adapted_wan()
    network.set_multiplier(0.5)
    adapted = network.model(*inputs())
    with network.enabled(False):
        assert torch.equal(network.model(*inputs()), base)
    with network.enabled(True):
        assert torch.equal(network.model(*inputs()), adapted)
    assert torch.equal(network.model(*inputs()), adapted)
    assert not torch.equal(adapted, base)


def test_adapters_go_on_a_quantised_base() -> None:
    model = tiny_wan()
    linear = model.get_submodule("blocks.0.self_attn.q")
    assert isinstance(linear, torch.nn.Linear)
    model.set_submodule("blocks.0.self_attn.q", Fp8Linear.quantized(linear.requires_grad_(False)))
    before = model(*inputs())
    network = inject(model, select_targets(model), rank=4, generator=seeded())
    assert "blocks.0.self_attn.q" in network.adapters
    assert torch.equal(model(*inputs()), before)


def test_one_group_without_lora_plus_and_two_with_it() -> None:
    network = adapted_wan()
    (group,) = network.groups(1e-4)
    assert group["lr"] == 1e-4 and len(group["params"]) == len(network.parameters())
    down, up = network.groups(1e-4, loraplus_lr_ratio=4)
    assert (down["lr"], up["lr"]) == (1e-4, 4e-4)
    assert {id(p) for p in up["params"]} == {id(a.lora_up.weight) for a in network.adapters.values()}
    assert {id(p) for p in down["params"]} == {id(a.lora_down.weight) for a in network.adapters.values()}
    assert [g["lr"] for g in torch.optim.AdamW([down, up]).param_groups] == [1e-4, 4e-4]


def test_a_training_state_comes_back_exactly() -> None:
    network, other = adapted_wan(), adapted_wan(seed=9)
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    other.load_state_dict(state)
    assert torch.equal(other.model(*inputs()), network.model(*inputs()))


def test_a_training_state_of_another_shape_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"lacks blocks\.0\.self_attn\.q\.lora_down"):
        adapted_wan().load_state_dict(adapted_wan(include=(".*ffn",)).state_dict())
    with pytest.raises(CheckpointError, match="--network_dim"):
        adapted_wan(rank=4).load_state_dict(adapted_wan(rank=8).state_dict())


def test_going_on_from_a_file_keeps_its_effect(caplog: pytest.LogCaptureFixture) -> None:
    saved, network = adapted_wan(alpha=4), adapted_wan(alpha=4, seed=9)
    with caplog.at_level(logging.INFO, "wanlora"):
        network.load(snapshot(saved))
    assert torch.equal(network.model(*inputs()), saved.model(*inputs()))
    assert "20/20 modules" in caplog.text and "rescaled" not in caplog.text


def test_going_on_under_another_alpha_rescales_so_that_the_effect_stays(caplog: pytest.LogCaptureFixture) -> None:
    saved, network = adapted_wan(alpha=1), adapted_wan(alpha=4, seed=9)
    with caplog.at_level(logging.INFO, "wanlora"):
        network.load(snapshot(saved))
    torch.testing.assert_close(network.model(*inputs()), saved.model(*inputs()))
    assert network.weights()["blocks.0.ffn.0"].alpha == 4
    assert "alpha 1 at rank 4" in caplog.text and "rescaled" in caplog.text


def test_going_on_with_another_rank_is_refused_with_the_cure() -> None:
    with pytest.raises(CheckpointError, match=r"style\.safetensors has rank 16.*--network_dim 4.*--dim_from_weights"):
        adapted_wan(rank=4).load(snapshot(adapted_wan(rank=16)), "style.safetensors")


def test_modules_that_this_run_would_lose_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"16 modules that this run does not train \(blocks\.0\.self_attn"):
        adapted_wan(include=(".*ffn",)).load(snapshot(adapted_wan()))


def test_modules_that_a_file_lacks_are_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "wanlora"):
        adapted_wan().load(snapshot(adapted_wan(include=(".*ffn",))))
    assert "lacks 16 modules" in caplog.text


def test_weights_of_another_model_are_refused() -> None:
    weights = snapshot(adapted_wan())
    given = weights["blocks.0.ffn.0"]
    weights["blocks.0.ffn.0"] = LoRAWeights(given.down[:, :-2], given.up, given.alpha)
    with pytest.raises(CheckpointError, match=r"another model: its blocks\.0\.ffn\.0 maps 62 to 96"):
        adapted_wan().load(weights)


@pytest.mark.parametrize("alpha", [1.0, 4.0])
def test_norms_are_those_of_the_full_updates(alpha: float) -> None:
    network = adapted_wan(alpha=alpha)
    norms = network.norms()
    for name, weights in network.weights().items():
        assert float(norms[name]) == pytest.approx(float(weights.delta().norm()), rel=1e-4)


def test_an_untrained_adapter_has_norm_zero() -> None:
    assert all(float(norm) == 0 for norm in adapted_wan(strength=0.0).norms().values())


def test_norms_above_the_limit_are_scaled_to_it_and_others_left_alone() -> None:
    network = adapted_wan()
    before = {name: float(norm) for name, norm in network.norms().items()}
    down = {name: w.down.clone() for name, w in network.weights().items()}
    limit = sorted(before.values())[12]
    stats = network.scale_weight_norms(limit)
    after = {name: float(norm) for name, norm in network.norms().items()}
    assert stats.num_scaled == 7
    assert stats.max == pytest.approx(limit)
    assert stats.mean == pytest.approx(sum(after.values()) / len(after), rel=1e-4)
    for name, norm in before.items():
        assert after[name] == pytest.approx(min(norm, limit), rel=1e-4)
        ratio = min(1.0, limit / norm) ** 0.5
        torch.testing.assert_close(network.weights()[name].down, down[name] * ratio)
