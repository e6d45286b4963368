"""Every kernel equals the reference; what a kernel cannot do is refused in words."""

import importlib.machinery
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from wanlora.foundation.errors import ConfigError
from wanlora.models import attention as module
from wanlora.models.attention import KERNELS, attention, require_kernel

PACKAGES = {
    "flash": ("flash_attn", "pip install flash-attn"),
    "flash3": ("flash_attn_interface", "hopper"),
    "xformers": ("xformers", "pip install xformers"),
    "sage": ("sageattention", "pip install sageattention"),
}


def qkv(dtype: torch.dtype = torch.float32, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 7, 3, 64, generator=generator)
    k = torch.randn(2, 11, 3, 64, generator=generator)
    v = torch.randn(2, 11, 3, 64, generator=generator) * scale
    return q.to(dtype), k.to(dtype), v.to(dtype)


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, function: str, code: object) -> None:
    """A package of that name with one function: what the real one promises, on the CPU."""
    package = ModuleType(name)
    package.__spec__ = importlib.machinery.ModuleSpec(name, None)
    setattr(package, function, code)
    monkeypatch.setitem(sys.modules, name, package)


def test_sdpa_equals_the_reference_in_output_and_gradients() -> None:
    results = []
    for kernel in ("reference", "sdpa"):
        q, k, v = (tensor.requires_grad_() for tensor in qkv())
        out = attention(q, k, v, kernel)
        out.square().sum().backward()
        results.append([out, q.grad, k.grad, v.grad])
    for ours, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_the_reference_is_the_formula() -> None:
    q, k, v = qkv()
    scores = (q[0, :, 1] @ k[0, :, 1].T / 8).softmax(-1)
    torch.testing.assert_close(attention(q, k, v, "reference")[0, :, 1], scores @ v[0, :, 1])


@pytest.mark.parametrize("kernel", ["sdpa", "reference"])
def test_the_output_has_the_dtype_of_the_inputs(kernel: str) -> None:
    assert attention(*qkv(torch.bfloat16), kernel).dtype == torch.bfloat16


@pytest.mark.parametrize("as_tuple", [False, True])
@pytest.mark.parametrize(
    ("kernel", "package", "function"),
    [
        ("flash", "flash_attn", "flash_attn_func"),
        ("flash3", "flash_attn_interface", "flash_attn_func"),
        ("xformers", "xformers.ops", "memory_efficient_attention"),
    ],
)
def test_packages_get_tensors_in_their_own_layout(
    kernel: str, package: str, function: str, as_tuple: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compute(q: Tensor, k: Tensor, v: Tensor) -> object:
        out = module._reference(q, k, v)
        return (out, None) if as_tuple and kernel == "flash3" else out

    stand_in(monkeypatch, package.split(".")[0], function, compute)
    stand_in(monkeypatch, package, function, compute)
    require_kernel(kernel)
    inputs = qkv(torch.bfloat16)
    assert torch.equal(attention(*inputs, kernel), attention(*inputs, "reference"))


def sage_like(q: Tensor, k: Tensor, v: Tensor, tensor_layout: str = "HND", is_causal: bool = False) -> Tensor:
    """The two traps of the real one: keys are changed in place, values pass through float16."""
    assert tensor_layout == "NHD" and not is_causal
    k -= k.mean(dim=1, keepdim=True)
    return module._reference(q, k, v.to(torch.float16).to(q.dtype))


@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_sage_leaves_the_keys_alone_and_survives_large_values(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "sageattention", "sageattn", sage_like)
    q, k, v = qkv(scale=scale)
    before = k.clone()
    with torch.no_grad():
        out = attention(q, k, v, "sage")
        expected = attention(q, k, v, "reference")
    assert torch.equal(k, before)
    assert out.isfinite().all()
    torch.testing.assert_close(out, expected, rtol=2e-3, atol=2e-3 * scale)


def test_sage_refuses_to_train_but_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "sageattention", "sageattn", sage_like)
    q, k, v = qkv()
    with pytest.raises(ConfigError, match=r"no backward pass.*--sdpa"):
        attention(q.requires_grad_(), k, v, "sage")
    with torch.no_grad():
        assert attention(q, k, v, "sage").shape == q.shape


@pytest.mark.parametrize("kernel", ["flash", "flash3"])
def test_flash_refuses_float32(kernel: str) -> None:
    with pytest.raises(ConfigError, match=r"float32; use --mixed_precision bf16"):
        attention(*qkv(), kernel)


@pytest.mark.parametrize("kernel", sorted(PACKAGES))
def test_a_missing_package_is_named_with_its_install_line(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package, line = PACKAGES[kernel]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError) as error:
        require_kernel(kernel)
    assert package in str(error.value)
    assert line in str(error.value)
    assert "--sdpa" in str(error.value)


def test_an_unknown_kernel_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'flash3'"):
        require_kernel("flsh3")
    assert set(KERNELS.names) == {"reference", "sdpa", *PACKAGES}


@pytest.mark.parametrize(("capability", "first"), [((8, 6), "FLASH_ATTENTION"), ((9, 0), "CUDNN_ATTENTION")])
def test_cudnn_goes_first_from_hopper_on(
    capability: tuple[int, int], first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    backends = module._cuda_backends()
    assert backends[0].name == first
    assert [backend.name for backend in backends[2:]] == ["EFFICIENT_ATTENTION", "MATH"]
