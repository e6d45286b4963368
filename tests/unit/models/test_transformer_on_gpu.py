"""On CUDA: every installed kernel equals the reference, a block is one graph, nothing waits for the device."""

import importlib.util
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from wanlora.models.attention import KERNELS, attention
from wanlora.models.wan.spec import WanSizes
from wanlora.models.wan.transformer import WanTransformer

pytestmark = pytest.mark.gpu

SIZES = WanSizes(dim=256, ffn_dim=512, num_layers=3, freq_dim=64, text_dim=48)
INSTALLED = [
    name
    for name in KERNELS.names
    if (package := KERNELS.get(name).package) is None or importlib.util.find_spec(package) is not None
]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def random_model(compute_dtype: torch.dtype) -> WanTransformer:
    model = WanTransformer(SIZES, compute_dtype=compute_dtype)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.06, generator=generator)
    return model.requires_grad_(False).cuda()


def inputs(latent: tuple[int, int, int] = (3, 8, 12)) -> tuple[Tensor, Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 16, *latent, generator=generator).cuda()
    return x, torch.tensor([700.0]).cuda(), [torch.randn(9, 48, generator=generator).cuda()]


@pytest.fixture
def _waiting_allowed_again() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kernel", INSTALLED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_installed_kernels_equal_the_reference(kernel: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, length, 4, 128, generator=generator).to("cuda", dtype) for length in (700, 512, 512))
    with torch.no_grad():
        expected = attention(q, k, v, "reference")
        assert relative(attention(q, k, v, kernel), expected) < (5e-2 if kernel == "sage" else 1e-2)


@pytest.mark.parametrize("kernel", [name for name in INSTALLED if KERNELS.get(name).trains])
def test_gradients_of_installed_kernels_equal_the_reference(kernel: str) -> None:
    gradients: list[Tensor] = []
    for name in ("reference", kernel):
        generator = torch.Generator().manual_seed(0)
        leaf = torch.randn(1, 300, 4, 128, generator=generator).to("cuda", torch.bfloat16).requires_grad_()
        attention(leaf, leaf, leaf, name).square().sum().backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    assert relative(gradients[1], gradients[0]) < 2e-2


def test_bfloat16_on_the_gpu_stays_close_to_float32_on_the_cpu() -> None:
    exact = random_model(torch.float32)
    rounded = random_model(torch.bfloat16)
    rounded.load_state_dict(exact.state_dict())
    on_gpu = rounded(*inputs())
    x, timestep, text = inputs()
    expected = exact.cpu()(x.cpu(), timestep.cpu(), [one.cpu() for one in text])
    assert relative(on_gpu.cpu(), expected) < 2e-2


def test_a_step_never_waits_for_the_device(_waiting_allowed_again: None) -> None:
    model = random_model(torch.bfloat16)
    x, timestep, text = inputs()
    x.requires_grad_()
    model(x, timestep, text)  # the rope table of this size is copied once
    torch.cuda.set_sync_debug_mode("error")
    model(x, timestep, text).square().sum().backward()


def test_blocks_compile_to_one_whole_graph_with_the_chosen_sdpa_backends() -> None:
    torch._dynamo.reset()
    model = random_model(torch.bfloat16)
    sizes = [(3, 8, 12), (2, 8, 8), (5, 8, 8)]
    plain = [model(*inputs(size)) for size in sizes]
    counter = CompileCounterWithBackend("inductor")
    compiled = {block: torch.compile(block, backend=counter, fullgraph=True) for block in model.blocks}
    model.run_block = lambda block, *args: compiled[block](*args)
    for size, expected in zip(sizes, plain, strict=True):
        assert relative(model(*inputs(size)), expected) < 2e-2
    assert counter.frame_count == 2
