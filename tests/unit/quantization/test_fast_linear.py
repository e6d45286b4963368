"""The linear that multiplies in fp8: near the plain one, forward and backward, and keeping nothing wide."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.compilers import make_boxed_compiler
from torch._functorch.partitioners import min_cut_rematerialization_partition

from tests.unit.quantization.test_fp8_linear import forward_and_gradient, recorded_saves
from wanlora.lora.layers import LoRALinear
from wanlora.memory.compile import compile_blocks
from wanlora.models.wan.blocks import WanBlock
from wanlora.models.wan.layers import project
from wanlora.models.wan.spec import WanSizes
from wanlora.quantization.fast_linear import FastFp8Linear, fast_layers, layers_by_input, wide_maths
from wanlora.quantization.linear import Fp8Linear
from wanlora.quantization.scaled_matmul import scaled_matmul
from wanlora.quantization.transposed import TransposedWeights


def make_linear(num_in: int = 128, num_out: int = 96, dtype: torch.dtype = torch.float32) -> FastFp8Linear:
    """Outputs of very different sizes, as modulated layers have them."""
    torch.manual_seed(0)
    linear = nn.Linear(num_in, num_out, dtype=dtype)
    linear.weight.data *= torch.logspace(-3, 0, num_out)[:, None].to(dtype)
    return FastFp8Linear.quantized(linear)


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).float().norm() / exact.float().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 128), (2, 37, 128), (50, 128)])
def test_output_and_input_gradient_are_near_those_of_plain_maths(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    linear = make_linear(dtype=dtype)
    x = torch.randn(shape).to(dtype)
    ours = forward_and_gradient(linear, x)
    with wide_maths([linear]):
        plain = forward_and_gradient(linear, x)
    for found, exact in zip(ours, plain, strict=True):
        assert (found.shape, found.dtype) == (exact.shape, dtype)
        assert 0 < relative(found, exact) < 0.045


def test_only_what_is_rounded_differs() -> None:
    """Numbers that e4m3 has pass without any error, and so do gradients."""
    linear = make_linear()
    linear.scale.data = torch.exp2(torch.arange(96) % 7).reshape(96, 1, 1)
    x = torch.randint(-8, 9, (5, 128)).float()
    x[:, 0] = 448.0
    x.requires_grad_()
    grad = torch.randint(-7, 8, (5, 96)).float()
    grad[:, 6] = 7.0  # 448 after the scale of its output
    results = []
    for layers in ((), (linear,)):
        with wide_maths(layers):
            out = linear(x)
            results.append((out.detach(), *torch.autograd.grad(out, x, grad)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-2)


def test_one_tokens_outlier_leaves_the_others_as_they_are() -> None:
    linear = make_linear()
    x = torch.randn(6, 128)
    calm = linear(x)
    x[2, 5] = 1e6
    assert torch.equal(linear(x)[[0, 1, 3, 4, 5]], calm[[0, 1, 3, 4, 5]])


def test_nothing_is_kept_for_backward_but_the_weight_and_it_is_read_where_it_is_by_then() -> None:
    linear = make_linear()
    x = torch.randn(5, 128)
    expected = forward_and_gradient(linear, x)[1]
    x.requires_grad_()
    with recorded_saves() as kept:
        loss = linear(x).square().sum()
    assert {tensor.data_ptr() for tensor in kept[:2]} == {linear.weight.data_ptr(), linear.scale.data_ptr()}
    linear.weight.data, old = linear.weight.data.clone(), linear.weight.data
    old.view(torch.uint8).zero_()
    loss.backward()
    assert x.grad is not None and torch.equal(x.grad, expected)


@pytest.mark.parametrize("backend", ["aot_eager", "aot_eager_decomp_partition"])
def test_it_compiles_into_one_graph_for_any_number_of_tokens_that_keeps_weights_as_they_are(backend: str) -> None:
    network = nn.Sequential(make_linear(), nn.GELU(), make_linear(96, 128))
    torch._dynamo.reset()
    compiled = torch.compile(network, backend=backend, fullgraph=True, dynamic=True)
    for num_tokens in (4, 11):
        x = torch.randn(num_tokens, 128)
        expected = forward_and_gradient(network, x)
        with recorded_saves() as kept:
            result = forward_and_gradient(compiled, x)
        torch.testing.assert_close(result, expected)
        weights = [tensor for tensor in kept if tensor.shape in {(96, 128), (128, 96)}]
        own = {parameter.data_ptr() for parameter in network.parameters()}
        assert len(weights) == 2 and {tensor.data_ptr() for tensor in weights} <= own


def make_shared() -> list[FastFp8Linear]:
    """Three layers for one input whose gradients have very different sizes, the last without a bias."""
    layers = [make_linear(num_out=num_out) for num_out in (96, 64, 32)]
    for layer, factor in zip(layers, (1.0, 0.1, 0.01), strict=True):
        layer.scale *= factor
    layers[-1].bias = None
    return layers


def outputs_and_gradient(layers: list[FastFp8Linear], x: Tensor) -> tuple[list[Tensor], Tensor]:
    x = x.clone().requires_grad_()
    outs = project(x, layers)
    total = torch.stack([out.square().sum() for out in outs]).sum()
    return [out.detach() for out in outs], torch.autograd.grad(total, x)[0]


@pytest.mark.parametrize("backend", ["eager", "aot_eager_decomp_partition"])
def test_layers_of_one_input_give_it_one_gradient_that_is_as_near_as_the_sum_of_theirs(backend: str) -> None:
    layers, x = make_shared(), torch.randn(2, 37, 128)
    torch._dynamo.reset()
    together = torch.compile(lambda x: project(x, layers), backend=backend, fullgraph=True, dynamic=True)
    with wide_maths(layers):
        plain, exact = outputs_and_gradient(layers, x)
    alone = [layer(x) for layer in layers]
    x.requires_grad_()
    found = together(x)
    torch.testing.assert_close(list(found), alone)
    (grad,) = torch.autograd.grad(found, x, [2 * out.detach() for out in found])
    assert all(0 < relative(ours.detach(), wide) < 0.045 for ours, wide in zip(found, plain, strict=True))
    assert grad.shape == x.shape and 0 < relative(grad, exact) < 0.045


def test_the_gradient_that_layers_share_is_one_product_and_keeps_nothing_but_their_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layers, x = make_shared(), torch.randn(5, 128)
    expected = outputs_and_gradient(layers, x)[1]
    shapes: list[tuple[int, ...]] = []

    def counted(*args: Any, **options: Any) -> Tensor:
        shapes.append(tuple(args[2].shape))
        return scaled_matmul(*args, **options)

    monkeypatch.setattr("wanlora.quantization.fast_linear.scaled_matmul", counted)
    x.requires_grad_()
    with recorded_saves() as kept:
        outs = project(x, layers)
    assert shapes == [(96, 128), (64, 128), (32, 128)]
    held = {tensor.data_ptr() for tensor in kept}
    assert held == {tensor.data_ptr() for layer in layers for tensor in (layer.weight, layer.scale)}
    for layer in layers:
        layer.weight.data, old = layer.weight.data.clone(), layer.weight.data
        old.view(torch.uint8).zero_()
    torch.stack([out.square().sum() for out in outs]).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, expected)
    assert shapes[3:] == [(128, 96 + 64 + 32)]


def test_layers_of_one_input_are_asked_one_by_one_where_a_product_of_them_all_would_gain_nothing() -> None:
    layers = make_shared()
    asked: list[FastFp8Linear] = []
    for layer in layers:
        layer.register_forward_hook(lambda module, args, out: asked.append(module))
    x = torch.randn(5, 128, requires_grad=True)
    project(x, layers)
    assert asked == []
    with torch.no_grad():
        project(x, layers)
    project(x.detach(), layers)
    with wide_maths(layers):
        project(x, layers)
    with wide_maths(layers[1:2]):
        project(x, layers)
    layers[2].transpose()
    project(x, layers)
    assert asked == 5 * layers


@pytest.mark.parametrize("side_by_side", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_layers_of_one_input_read_their_transposed_weights_and_nothing_else_changes(
    compiled: bool, side_by_side: bool
) -> None:
    layers, x = make_shared(), torch.randn(5, 128)
    expected = outputs_and_gradient(layers, x)
    if side_by_side:
        FastFp8Linear.transpose_together(layers)
    for layer in layers if not side_by_side else ():
        layer.transpose()
    across = [layers[0].across_all] if side_by_side else [layer.across for layer in layers]
    x.requires_grad_()
    torch._dynamo.reset()
    graph = torch.compile(lambda x: project(x, layers), backend="aot_eager_decomp_partition", fullgraph=True)
    with recorded_saves() as kept:
        outs = graph(x) if compiled else project(x, layers)
    held = {tensor.data_ptr(): tuple(tensor.shape) for tensor in kept}
    assert all(tensor is not None and held[tensor.data_ptr()] == tuple(tensor.shape) for tensor in across)
    for layer in layers:
        layer.weight.data.view(torch.uint8).zero_()  # backward has no need of it
    torch.stack([out.square().sum() for out in outs]).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, expected[1])
    assert all(torch.equal(ours, plain) for ours, plain in zip(outs, expected[0], strict=True))


def test_a_layer_alone_reads_its_part_of_what_lies_side_by_side() -> None:
    layers, x = make_shared(), torch.randn(5, 128)
    expected = [forward_and_gradient(layer, x) for layer in layers]
    both = outputs_and_gradient(layers[:2], x)
    FastFp8Linear.transpose_together(layers)
    for layer, (out, grad) in zip(layers, expected, strict=True):
        found = forward_and_gradient(layer, x)
        assert torch.equal(found[0], out) and torch.equal(found[1], grad)
    found_both = outputs_and_gradient(layers[:2], x)  # fewer than lie there
    assert all(map(torch.equal, (*found_both[0], found_both[1]), (*both[0], both[1])))


def test_layers_that_get_one_input_are_grouped_as_their_module_says() -> None:
    sizes = WanSizes(dim=128, ffn_dim=96, num_layers=1, in_channels=4, out_channels=4, text_dim=32, freq_dim=32)
    block = WanBlock(sizes, torch.bfloat16).requires_grad_(False)
    for name, linear in [*block.named_modules()]:
        if isinstance(linear, nn.Linear):
            base = FastFp8Linear.quantized(linear)
            block.set_submodule(
                name, LoRALinear(base, rank=4, scale=1.0, generator=torch.Generator()) if "self_attn" in name else base
            )
    groups = layers_by_input(block)
    names = {id(layer): name.removesuffix(".base") for name, layer in fast_layers(block).items()}
    assert [names[id(layer)] for layer in groups[0]] == ["self_attn.q", "self_attn.k", "self_attn.v"]
    assert sorted(names[id(layer)] for group in groups for layer in group) == sorted(names.values())
    assert all(len(group) == 1 for group in groups[1:])
    (k,) = (layer for layer in groups[0] if names[id(layer)] == "self_attn.k")
    k.kernel = None  # this one multiplies in bfloat16
    assert all(len(group) == 1 for group in layers_by_input(block)) and len(layers_by_input(block)) == len(names) - 1


def make_blocks(number: int) -> list[nn.Sequential]:
    return [nn.Sequential(make_linear(), nn.GELU(), make_linear(96, 128)) for _ in range(number)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_transposed_weight_is_read_in_place_of_the_weight_and_nothing_else_changes(dtype: torch.dtype) -> None:
    linear = make_linear(dtype=dtype)
    x = torch.randn(2, 37, 128).to(dtype)
    expected = forward_and_gradient(linear, x)
    linear.transpose()
    assert linear.across is not None and linear.across.is_contiguous()
    x.requires_grad_()
    with recorded_saves() as kept:
        out = linear(x)
    assert {tensor.data_ptr() for tensor in kept} == {linear.across.data_ptr(), linear.scale.data_ptr()}
    with torch.no_grad():
        assert torch.equal(linear(x), out)
    linear.weight.data.view(torch.uint8).zero_()  # backward has no need of it
    out.square().sum().backward()
    assert x.grad is not None
    assert torch.equal(out, expected[0]) and torch.equal(x.grad, expected[1])
    assert "across" not in linear.state_dict()


@pytest.mark.parametrize("backend", ["aot_eager", "aot_eager_decomp_partition"])
def test_compiled_blocks_share_a_graph_with_transposed_weights_and_one_without(backend: str) -> None:
    blocks = make_blocks(3)
    x = torch.randn(6, 128)
    torch._dynamo.reset()
    compile_blocks(blocks, backend=backend, fullgraph=True)
    expected = [forward_and_gradient(block, x) for block in blocks]
    weights = TransposedWeights(group for block in blocks for group in layers_by_input(block))
    counted = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    weights.keep()
    for block, plain in zip(blocks, expected, strict=True):
        first, last = block[0], block[2]
        assert isinstance(first, FastFp8Linear) and isinstance(last, FastFp8Linear)
        assert first.across is not None and last.across is not None
        with recorded_saves() as kept:
            found = forward_and_gradient(block, x)
        held = {tensor.data_ptr() for tensor in kept}
        assert {first.across.data_ptr(), last.across.data_ptr()} <= held
        assert not {first.weight.data_ptr(), last.weight.data_ptr()} & held
        assert all(torch.equal(ours, exact) for ours, exact in zip(found, plain, strict=True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == counted + 1
    weights.drop()
    for block, plain in zip(blocks, expected, strict=True):
        found = forward_and_gradient(block, x)
        assert all(torch.equal(ours, exact) for ours, exact in zip(found, plain, strict=True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == counted + 1


def test_transposed_weights_are_counted_and_an_error_leaves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [make_linear(), make_linear(96, 64)]
    weights = TransposedWeights([[layer] for layer in layers])
    assert not weights.are_kept
    weights.keep()
    assert weights.are_kept and weights.num_bytes == 128 * 96 + 96 * 64
    weights.drop()
    assert not weights.are_kept and weights.num_bytes == 0

    def too_much() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(layers[1], "transpose", too_much)
    with pytest.raises(torch.OutOfMemoryError):
        weights.keep()
    assert not weights.are_kept


def test_a_shared_input_is_rounded_once_in_a_compiled_graph() -> None:
    queries, keys = make_linear(), make_linear()
    roundings: list[int] = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        casts = [node for node in graph.graph.nodes if torch.float8_e4m3fn in (*node.args, *node.kwargs.values())]
        roundings.append(len(casts))
        return graph

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=make_boxed_compiler(count), partition_fn=min_cut_rematerialization_partition)
    x = torch.randn(4, 128, requires_grad=True)
    torch.compile(lambda x: queries(x) + keys(x), backend=backend, fullgraph=True)(x)
    assert roundings == [1]


def test_compiled_blocks_heed_which_of_their_layers_multiply_in_fp8() -> None:
    blocks = make_blocks(3)
    widened = blocks[1][2]
    assert isinstance(widened, FastFp8Linear)
    widened.kernel = None
    x = torch.randn(6, 128, requires_grad=True)
    expected = [block(x).detach() for block in blocks]
    torch._dynamo.reset()
    compile_blocks(blocks, backend="aot_eager", fullgraph=True)
    found = [block(x).detach() for block in blocks]
    for ours, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, plain)
    assert not torch.equal(found[1], found[0]) and torch.equal(found[2], found[0])


def test_turning_fp8_maths_off_is_the_plain_layer_to_the_bit() -> None:
    linear = make_linear()
    plain = Fp8Linear(linear.weight, linear.scale, linear.bias, compute_dtype=torch.float32)
    x = torch.randn(3, 128)
    holder = nn.Sequential(linear, plain)
    assert list(fast_layers(holder)) == ["0"]
    with wide_maths([linear]):
        assert fast_layers(holder) == {}
        for found, expected in zip(forward_and_gradient(linear, x), forward_and_gradient(plain, x), strict=True):
            assert torch.equal(found, expected)
    assert linear.kernel == "emulated"


def test_quantising_a_linear_gives_a_scale_to_each_output() -> None:
    linear = nn.Linear(128, 96, bias=False, dtype=torch.bfloat16)
    fast = FastFp8Linear.quantized(linear)
    assert (fast.kernel, fast.compute_dtype, fast.bias) == ("emulated", torch.bfloat16, None)
    torch.testing.assert_close(fast.scale.flatten(), linear.weight.float().abs().amax(dim=1) / 448)
    assert 0.015 < relative(fast.dequantized(), linear.weight.detach()) < 0.03
    with pytest.raises(ValueError, match="not one for 64 inputs"):
        FastFp8Linear.quantized(linear, block=64)


@pytest.mark.parametrize(
    ("weight", "scale"),
    [
        (torch.zeros(96, 100).to(torch.float8_e4m3fn), torch.ones(96, 1, 1)),
        (torch.zeros(96, 128).to(torch.float8_e5m2), torch.ones(96, 1, 1)),
        (torch.zeros(96, 128).to(torch.float8_e4m3fn), torch.ones(96, 2, 1)),
        (torch.zeros(96, 128).to(torch.float8_e4m3fn), torch.ones(1, 1, 1)),
    ],
)
def test_weights_that_cannot_be_multiplied_so_are_refused(weight: Tensor, scale: Tensor) -> None:
    with pytest.raises(ValueError, match="fp8 maths want"):
        FastFp8Linear(weight, scale, kernel="emulated")
