"""The fp8 linear: equal to plain autograd on the dequantised weight, and keeping nothing wide."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from wanlora.quantization.blockwise import dequantize, quantize_blockwise
from wanlora.quantization.linear import Fp8Linear


def make_linear(dtype: torch.dtype = torch.float32) -> Fp8Linear:
    torch.manual_seed(0)
    return Fp8Linear.quantized(nn.Linear(128, 96, dtype=dtype))


@contextmanager
def recorded_saves() -> Iterator[list[Tensor]]:
    """The tensors that autograd saves inside."""
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def forward_and_gradient(call: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    out = call(x)
    out.square().sum().backward()
    assert x.grad is not None
    return out.detach(), x.grad


def test_output_and_input_gradient_equal_plain_autograd_on_the_dequantised_weight() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        linear = make_linear(dtype)
        x = torch.randn(2, 5, 128, dtype=dtype)
        plain = forward_and_gradient(lambda x: F.linear(x, linear.dequantized(), linear.bias), x)  # noqa: B023
        ours = forward_and_gradient(linear, x)
        assert ours[0].dtype == dtype
        assert torch.equal(ours[0], plain[0]) and torch.equal(ours[1], plain[1])


def test_nothing_of_the_weight_is_kept_for_backward_but_the_weight() -> None:
    linear = make_linear()
    with recorded_saves() as kept:
        linear(torch.randn(5, 128, requires_grad=True))
    assert [tensor.data_ptr() for tensor in kept] == [linear.weight.data_ptr(), linear.scale.data_ptr()]


def test_backward_reads_the_weight_where_it_is_by_then() -> None:
    linear = make_linear()
    x = torch.randn(5, 128)
    expected = forward_and_gradient(linear, x)[1]
    x.requires_grad_()
    loss = linear(x).square().sum()
    linear.weight.data, old = linear.weight.data.clone(), linear.weight.data
    old.view(torch.uint8).zero_()
    loss.backward()
    assert x.grad is not None and torch.equal(x.grad, expected)


def test_no_tensor_of_it_is_trained_and_it_survives_a_state_dict() -> None:
    linear = make_linear()
    assert not any(tensor.requires_grad for tensor in (*linear.parameters(), *linear.buffers()))
    other = make_linear()
    other.weight.data.view(torch.uint8).zero_()
    other.load_state_dict(linear.state_dict())
    assert torch.equal(other.dequantized(), linear.dequantized())


def test_it_works_without_a_bias_and_without_gradients() -> None:
    fp8, scale = quantize_blockwise(torch.randn(96, 128))
    linear = Fp8Linear(fp8, scale, compute_dtype=torch.float32)
    x = torch.randn(3, 128)
    with torch.no_grad():
        assert torch.equal(linear(x), x @ dequantize(fp8, scale, torch.float32).T)
    assert linear(x).grad_fn is None


def test_it_compiles_into_one_graph_that_keeps_no_wide_weight() -> None:
    network = nn.Sequential(make_linear(), nn.GELU(), Fp8Linear.quantized(nn.Linear(96, 128)))
    x = torch.randn(4, 128)
    expected = forward_and_gradient(network, x)
    for backend in ("aot_eager", "aot_eager_decomp_partition"):
        torch._dynamo.reset()
        compiled = torch.compile(network, backend=backend, fullgraph=True)
        with recorded_saves() as kept:
            result = forward_and_gradient(compiled, x)
        torch.testing.assert_close(result, expected)
        weights = [tensor for tensor in kept if tensor.shape in {(96, 128), (128, 96)}]
        assert len(weights) == 2 and {tensor.dtype for tensor in weights} == {torch.float8_e4m3fn}
