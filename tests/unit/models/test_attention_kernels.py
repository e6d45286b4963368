"""Every kernel equals the reference; what a kernel cannot do is refused in words."""

import importlib.machinery
import subprocess
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


def ending_alike(dtype: torch.dtype = torch.float32, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v whose last two keys and values are the same."""
    q, k, v = (x.to(dtype) for x in qkv())
    return q, torch.cat((k, k[:, -1:]), dim=1) * scale, torch.cat((v, v[:, -1:]), dim=1)


def written_out(x: Tensor, alike: int) -> Tensor:
    return torch.cat((x, x[:, -1:].expand(-1, alike - 2, -1, -1)), dim=1)


def row_gradients(out: Tensor, q: Tensor, *keys_and_values: Tensor) -> list[Tensor]:
    """Gradients; those of the two rows that are alike in one sum, because both are made of the same text row."""
    grad_q, *others = torch.autograd.grad(out.square().sum(), (q, *keys_and_values))
    return [grad_q, *(torch.cat((g[:, :-2], g[:, -2:].sum(1, keepdim=True)), dim=1) for g in others)]


@pytest.mark.parametrize("scale", [0.1, 2.0])
@pytest.mark.parametrize("alike", [2, 3, 17, 490])
@pytest.mark.parametrize("kernel", ["reference", "sdpa"])
def test_two_rows_stand_for_many_in_output_and_gradients(kernel: str, alike: int, scale: float) -> None:
    q, k, v = (x.requires_grad_() for x in ending_alike(scale=scale))
    found = attention(q, k, v, kernel, alike=alike)
    expected = attention(q, written_out(k, alike), written_out(v, alike), kernel)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for ours, written in zip(row_gradients(found, q, k, v), row_gradients(expected, q, k, v), strict=True):
        torch.testing.assert_close(ours, written, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("alike", range(2, 512, 51))
def test_in_bfloat16_the_count_of_rows_is_exact_to_a_thousandth(alike: int) -> None:
    added = module._log_counts(5, alike, torch.bfloat16, torch.device("cpu"))
    assert added.dtype == torch.bfloat16 and added[:3].tolist() == [0, 0, 0]
    assert added[3:].float().exp().sum().item() == pytest.approx(alike, rel=1e-3)


def test_a_kernel_that_adds_nothing_to_scores_sees_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "flash_attn", "flash_attn_func", module._reference)
    q, k, v = ending_alike(torch.bfloat16)
    expected = attention(q, written_out(k, 17), written_out(v, 17), "flash")
    assert torch.equal(attention(q, k, v, "flash", alike=17), expected)


@pytest.mark.parametrize(("capability", "counts"), [((8, 6), False), ((9, 0), True), ((12, 0), False)])
def test_only_cards_on_which_that_was_measured_count_rows(
    capability: tuple[int, int], counts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert module._counts_rows(KERNELS.get("sdpa"), torch.device("cuda")) == counts
    assert module._counts_rows(KERNELS.get("sdpa"), torch.device("cpu"))


def test_rows_are_written_out_where_they_cannot_be_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_counts_rows", lambda kernel, device: False)
    q, k, v = ending_alike()
    expected = attention(q, written_out(k, 17), written_out(v, 17), "sdpa")
    assert torch.equal(attention(q, k, v, "sdpa", alike=17), expected)


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


def test_a_compiler_takes_the_choice_of_backends_as_a_constant_and_is_not_imported_for_it() -> None:
    marked = torch.compiler.assume_constant_result(lambda: None)
    assert vars(marked).items() <= vars(module._cuda_backends).items()
    code = "import sys, wanlora.models.attention; print('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
