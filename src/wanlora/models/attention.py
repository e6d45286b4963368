"""Attention over heads: one function, several kernels, one reference.

Every kernel computes softmax(q k^T / sqrt(K)) v without a mask for q [B, L, N, K] and k, v [B, T, N, K]; they differ in
speed and in what they need. `sdpa` comes with PyTorch; the others are packages that are imported only when chosen. A
kernel is one function registered here and one row in the parity test.

Keys and values may end with rows that are all alike, as padded texts do. Two of them then stand for all: a row that
stands for n others counts n times in the softmax, which is a log(n) added to its score. Kernels that know no such
addition are given the rows written out, and so are cards on which it has not been measured.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from wanlora.foundation.errors import ConfigError
from wanlora.foundation.registry import Registry

AttentionFunction = Callable[..., Tensor]
"""(q, k, v), and for those that can count rows the number that the last two stand for."""

SAGE_VALUE_LIMIT = 512.0
"""SageAttention sums 64 float16 products at a time, so values above this could overflow (64 x 512 < 65504)."""
_FIRST_SHARE = 0.97
"""What the first of two rows that stand for many is worth; see `_log_counts`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernel:
    """One way to compute attention."""

    compute: AttentionFunction
    package: str | None = None
    """Module that must be importable."""
    install: str = ""
    """How the user gets it."""
    half_only: bool = False
    """Whether inputs must be bfloat16 or float16."""
    trains: bool = True
    """Whether it has a backward pass."""
    counts_rows: bool = False
    """Whether it can be told how many rows the last two stand for."""


KERNELS: Registry[Kernel] = Registry("attention kernel")


def attention(
    q_BLNK: Tensor, k_BTNK: Tensor, v_BTNK: Tensor, kernel: str = "sdpa", *, alike: int | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(K)) v, [B, L, N, K] in the dtype of the inputs.

    With `alike` the last two rows of keys and of values are the same and stand for so many rows together, at least 2.
    Raises `ConfigError` for an unknown kernel, for a dtype that the kernel cannot take, and when a kernel without a
    backward pass would have to train.
    """
    chosen = KERNELS.get(kernel)
    require_dtype(kernel, q_BLNK.dtype)
    if not chosen.trains and torch.is_grad_enabled() and _wants_grad(q_BLNK, k_BTNK, v_BTNK):
        raise ConfigError(
            f"{kernel} attention has no backward pass, so a model cannot be trained through it; use --sdpa to train "
            "(previews may still use it)"
        )
    if alike is None:
        return chosen.compute(q_BLNK, k_BTNK, v_BTNK)
    if not _counts_rows(chosen, q_BLNK.device):
        return chosen.compute(q_BLNK, _written_out(k_BTNK, alike), _written_out(v_BTNK, alike))
    return chosen.compute(q_BLNK, k_BTNK, v_BTNK, alike)


def _written_out(x_BTNK: Tensor, alike: int) -> Tensor:
    """All rows that the last two stand for, [B, T - 2 + alike, N, K]."""
    return torch.cat((x_BTNK, x_BTNK[:, -1:].expand(-1, alike - 2, -1, -1)), dim=1)


def _log_counts(rows: int, alike: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Logarithms of how often each of `rows` rows counts, [rows].

    In bfloat16 a logarithm near 6 is up to 1.6 % of a count off. So one row stands for nearly all that are alike, and
    the other makes up for the rest and for the rounding of the first: together they are off by less than 0.1 %.
    """
    count = torch.full((1,), alike, device=device, dtype=torch.float32)
    first = (count * _FIRST_SHARE).log().to(dtype)
    second = (count - first.float().exp()).log().to(dtype)
    return F.pad(torch.cat((first, second)), (rows - 2, 0))


def require_kernel(name: str) -> None:
    """Raise `ConfigError` if the kernel is unknown or its package is not installed."""
    kernel = KERNELS.get(name)
    if kernel.package is not None and importlib.util.find_spec(kernel.package) is None:
        raise ConfigError(f"{name} attention needs the package {kernel.package}: {kernel.install}; or use --sdpa")


def require_dtype(name: str, dtype: torch.dtype) -> None:
    """Raise `ConfigError` if the kernel cannot compute in `dtype`."""
    if KERNELS.get(name).half_only and dtype not in (torch.bfloat16, torch.float16):
        raise ConfigError(
            f"{name} attention computes in bfloat16 or float16, the model runs in {dtype}; "
            "use --mixed_precision bf16, or --sdpa"
        )


def _reference(q_BLNK: Tensor, k_BTNK: Tensor, v_BTNK: Tensor, alike: int | None = None) -> Tensor:
    """The formula, in float32."""
    scores = torch.einsum("blnk,btnk->bnlt", q_BLNK.float(), k_BTNK.float()) * q_BLNK.shape[-1] ** -0.5
    if alike is not None:
        scores = scores + _log_counts(k_BTNK.shape[1], alike, torch.float32, k_BTNK.device)
    return torch.einsum("bnlt,btnk->blnk", scores.softmax(dim=-1), v_BTNK.float()).to(q_BLNK.dtype)


def _sdpa(q_BLNK: Tensor, k_BTNK: Tensor, v_BTNK: Tensor, alike: int | None = None) -> Tensor:
    """PyTorch's own. On CUDA its fastest backend for the card goes first; the others serve what that cannot take."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLNK, k_BTNK, v_BTNK))
    added = None
    if alike is not None:
        added = _log_counts(k.shape[2], alike, q.dtype, q.device).expand(q.shape[0], 1, q.shape[2], -1)
    if q.device.type == "cuda":
        with sdpa_kernel(_cuda_backends(), set_priority=True):
            out = F.scaled_dot_product_attention(q, k, v, added)
    else:
        out = F.scaled_dot_product_attention(q, k, v, added)
    return out.transpose(1, 2)


def _cuda_backends() -> list[SDPBackend]:
    """cuDNN first from Hopper on, where it is 1.7 times as fast as flash; flash first before."""
    fast = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    if torch.cuda.get_device_capability() >= (9, 0):
        fast.reverse()
    return [*fast, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def _counts_rows(kernel: Kernel, device: torch.device) -> bool:
    """Whether the kernel is told there how many rows the last two stand for."""
    return kernel.counts_rows and (device.type != "cuda" or _card_counts_rows())


def _card_counts_rows() -> bool:
    """Whether the addition has been measured on this kind of card: on Hopper, with cuDNN's kernel."""
    return torch.cuda.get_device_capability() == (9, 0)


# What `torch.compiler.assume_constant_result` does, without importing the compiler, which takes a second.
_cuda_backends._dynamo_marked_constant = True  # type: ignore[attr-defined]
_card_counts_rows._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _flash(q_BLNK: Tensor, k_BTNK: Tensor, v_BTNK: Tensor) -> Tensor:
    from flash_attn import flash_attn_func

    out: Tensor = flash_attn_func(q_BLNK, k_BTNK, v_BTNK)
    return out


def _flash3(q_BLNK: Tensor, k_BTNK: Tensor, v_BTNK: Tensor) -> Tensor:
    from flash_attn_interface import flash_attn_func

    out = flash_attn_func(q_BLNK, k_BTNK, v_BTNK)
    first: Tensor = out[0] if isinstance(out, tuple) else out  # older builds also return the log-sum-exp
    return first


def _xformers(q_BLNK: Tensor, k_BTNK: Tensor, v_BTNK: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention

    out: Tensor = memory_efficient_attention(q_BLNK, k_BTNK, v_BTNK)
    return out


def _sage(q_BLNK: Tensor, k_BTNK: Tensor, v_BTNK: Tensor) -> Tensor:
    """SageAttention: int8 scores, float16 values, forward only.

    It subtracts the mean of the keys from the tensor it is given, so it is given a copy; it casts values to float16
    without a check, so large ones are scaled down first and back up afterwards (attention is linear in its values).
    """
    from sageattention import sageattn

    scale_B1N1 = (v_BTNK.abs().amax(dim=(1, 3), keepdim=True).float() / SAGE_VALUE_LIMIT).clamp(min=1)
    small_BTNK = (v_BTNK / scale_B1N1).to(v_BTNK.dtype)
    out: Tensor = sageattn(q_BLNK, k_BTNK.clone(), small_BTNK, tensor_layout="NHD", is_causal=False)
    return (out * scale_B1N1).to(v_BTNK.dtype)


KERNELS.register("reference")(Kernel(compute=_reference, counts_rows=True))
KERNELS.register("sdpa")(Kernel(compute=_sdpa, counts_rows=True))
KERNELS.register("flash")(
    Kernel(compute=_flash, package="flash_attn", install="pip install flash-attn --no-build-isolation", half_only=True)
)
KERNELS.register("flash3")(
    Kernel(
        compute=_flash3,
        package="flash_attn_interface",
        install="it is on no package index: build the folder hopper of github.com/Dao-AILab/flash-attention "
        "(pip install . in it; Hopper cards only)",
        half_only=True,
    )
)
KERNELS.register("xformers")(Kernel(compute=_xformers, package="xformers", install="pip install xformers"))
KERNELS.register("sage")(
    Kernel(
        compute=_sage,
        package="sageattention",
        install="pip install sageattention (on Windows triton-windows too)",
        trains=False,
    )
)


def _wants_grad(*tensors: Tensor) -> bool:
    return any(tensor.requires_grad for tensor in tensors)
