"""Layers of the Wan video autoencoder that can work through a clip piece by piece.

A clip is too large to convolve at once, so it is fed in chunks along time. Every convolution over time is causal: it
looks at the present and at two frames of the past, never ahead. What it needs of the past is kept between chunks in a
`ChunkCache` that travels through the layers as an argument; the modules themselves hold weights and nothing else, so
one model can serve two clips at once and an interrupted clip leaves no trace.

The chunks are part of the definition: the first frame (or latent) goes alone and skips the resampling of time. After
it, chunks of any size give the same result, and the size only trades memory for speed.

Where nothing lies before a single frame, the taps of a kernel that would meet zeros are left out: pictures and first
frames cost a third.

On the wide levels the convolutions wait for memory, so what lies between two of them is one pass: norm and SiLU write
their result beside the past that the next convolution reads (`Stage`). With gradients the plain layers run, which are
the reference. Source: wan/modules/vae.py of github.com/Wan-Video/Wan2.1.
"""

from collections.abc import Callable, Iterable
from functools import partial
from math import sqrt

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from wanlora.models.wan.vae_kernels import activate_rows

_SCORES = 2**24
"""Attention scores that are held at once where memory counts."""


class ChunkCache:
    """What the layers remember of one clip between its chunks."""

    def __init__(self, *, on_cpu: bool = False, frugal: bool = False) -> None:
        self.first = True
        """Whether the chunk at hand is the clip's first."""
        self.frugal = frugal
        """Whether memory counts more than time."""
        self._last = False
        self._on_cpu = on_cpu
        self._kept: dict[nn.Module, Tensor] = {}

    def begin(self, *, first: bool, last: bool) -> None:
        """Announce a chunk; nothing is kept of the last one."""
        self.first, self._last = first, last

    def recall(self, layer: nn.Module, x: Tensor) -> Tensor | None:
        """What `layer` kept of the previous chunk, on the device of `x`, or None."""
        past = self._kept.pop(layer, None)
        return past if past is None else past.to(x.device)

    def keep(self, layer: nn.Module, frames: Tensor) -> None:
        """Keep `frames` for the next chunk, as a copy that does not hold the whole chunk in memory."""
        if not self._last:
            self._kept[layer] = frames.to("cpu" if self._on_cpu else frames.device, copy=True)


class CausalLayer(nn.Module):
    """A layer whose `forward` takes the cache as its second argument."""


def in_turn(layers: Iterable[nn.Module], x: Tensor, cache: ChunkCache) -> Tensor:
    """`x` through `layers`, one after the other; the cache goes to those that use one. What is used up is let go."""
    for layer in layers:
        x = layer(x, cache) if isinstance(layer, CausalLayer) else layer(x)
    return x


class Chain(nn.Sequential, CausalLayer):
    """Layers in a row."""

    def forward(self, x: Tensor, cache: ChunkCache) -> Tensor:  # type: ignore[override]
        return in_turn(self, x, cache)


class CausalConv3d(nn.Conv3d, CausalLayer):
    """A convolution over the present and the past, zero-padded in space and before the clip's beginning."""

    def __init__(self, in_channels: int, out_channels: int, kernel: tuple[int, int, int]) -> None:
        super().__init__(in_channels, out_channels, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))
        self._reach = kernel[0] - 1

    def forward(self, x: Tensor, cache: ChunkCache) -> Tensor:  # type: ignore[override]
        num_frames = x.shape[2]
        past = cache.recall(self, x)
        if past is not None:
            x = torch.cat([past, x], dim=2)
        self.keep(x, cache)
        num_missing = self._reach + num_frames - x.shape[2]
        if num_frames > 1 and num_missing:
            x = F.pad(x, (0, 0, 0, 0, num_missing, 0))
        return self.convolve(x)

    def keep(self, x: Tensor, cache: ChunkCache) -> None:
        """Keep what the next chunk needs of frames with their past."""
        cache.keep(self, x[:, :, -self._reach :])

    def room(self, x: Tensor, cache: ChunkCache) -> tuple[Tensor, Tensor]:
        """What `convolve` takes for a chunk shaped as `x`, with the past in its place, and its part for the chunk."""
        past = cache.recall(self, x)
        num_past = 0 if past is None else past.shape[2]
        lead = self._reach if x.shape[2] > 1 else num_past
        shape = (*x.shape[:2], lead + x.shape[2], *x.shape[3:])
        beside = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_format_of(x))
        beside[:, :, : lead - num_past].zero_()
        if past is not None:
            beside[:, :, lead - num_past : lead] = past
        return beside, beside[:, :, lead:]

    def convolve(self, x: Tensor) -> Tensor:
        """The convolution of frames with as many frames of the past before them as there are."""
        if x.shape[2] == 1:
            return F.conv2d(x.squeeze(2), self.weight[:, :, -1], self.bias, padding=self.padding[1:]).unsqueeze(2)
        num_missing = max(0, self._reach + 1 - x.shape[2])
        return F.conv3d(x, self.weight[:, :, num_missing:], self.bias, padding=self.padding)


class ChannelNorm(nn.Module):
    """x / |x| over the channels, times sqrt(channels) and a learned `gamma`; `num_axes` follow the channels."""

    def __init__(self, channels: int, num_axes: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * num_axes))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1).mul_(self.gamma * sqrt(len(self.gamma)))

    def activate(self, x: Tensor, out: Tensor) -> None:
        """Write SiLU of the norm of `x` to `out`, another tensor of its shape."""
        if not activate_rows(x, self.gamma, out):
            F.silu(torch.mul(F.normalize(x, dim=1), self.gamma * sqrt(len(self.gamma)), out=out), inplace=True)


class Stage:
    """Norm, SiLU and a causal convolution in two passes over memory. It has no gradients and owns no weights."""

    def __init__(self, norm: ChannelNorm, conv: CausalConv3d) -> None:
        self._norm, self._conv = norm, conv

    def prepare(self, x: Tensor, cache: ChunkCache) -> Tensor:
        """SiLU of the norm of `x`, beside the past."""
        beside, present = self._conv.room(x, cache)
        self._norm.activate(x, present)
        self._conv.keep(beside, cache)
        return beside

    def finish(self, beside: Tensor) -> Tensor:
        """The convolution of what `prepare` made."""
        return self._conv.convolve(beside)


class Head(Chain):
    """The last norm and convolution."""

    def __init__(self, width: int, out_channels: int) -> None:
        norm, conv = ChannelNorm(width), CausalConv3d(width, out_channels, (3, 3, 3))
        super().__init__(norm, nn.SiLU(inplace=True), conv)
        self._stage = Stage(norm, conv)

    def forward(self, x: Tensor, cache: ChunkCache) -> Tensor:  # type: ignore[override]
        if torch.is_grad_enabled():
            return super().forward(x, cache)
        return self._stage.finish(self._stage.prepare(x, cache))


class ResidualBlock(CausalLayer):
    """Two causal 3x3x3 convolutions beside a shortcut."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        norms = ChannelNorm(in_channels), ChannelNorm(out_channels)
        convs = CausalConv3d(in_channels, out_channels, (3, 3, 3)), CausalConv3d(out_channels, out_channels, (3, 3, 3))
        self.residual = Chain(
            norms[0],
            nn.SiLU(inplace=True),
            convs[0],
            norms[1],
            nn.SiLU(inplace=True),
            nn.Identity(),  # a dropout in training code; it keeps the official numbering
            convs[1],
        )
        self.shortcut = nn.Identity() if in_channels == out_channels else nn.Conv3d(in_channels, out_channels, 1)
        self._stages = Stage(norms[0], convs[0]), Stage(norms[1], convs[1])

    def forward(self, x: Tensor, cache: ChunkCache) -> Tensor:
        y: Tensor = self.residual(x, cache) if torch.is_grad_enabled() else self._in_stages(x, cache)
        return y.add_(self.shortcut(x))

    def _in_stages(self, x: Tensor, cache: ChunkCache) -> Tensor:
        first, second = self._stages
        y = first.finish(first.prepare(x, cache))
        beside = second.prepare(y, cache)
        del y  # on the wide levels every tensor counts
        return second.finish(beside)


class FrameAttention(CausalLayer):
    """One attention head over all positions of a frame; frames do not see each other.

    The head is wider than flash kernels allow, so scores may be held in full: one frame at a time bounds them, and some
    of its queries at a time where memory counts more than time.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels, num_axes=2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, cache: ChunkCache) -> Tensor:
        positions = x.shape[3] * x.shape[4]
        at_once = max(1, _SCORES // positions) if cache.frugal else positions
        return x + _frame_by_frame(partial(self._attend, at_once=at_once), x)

    def _attend(self, x: Tensor, at_once: int) -> Tensor:
        q, k, v = rearrange(self.to_qkv(self.norm(x)), "f (part c) h w -> part f 1 (h w) c", part=3)
        frames = zip(q.split(1), k.split(1), v.split(1), strict=True)
        out = torch.cat([_attention(*frame, at_once) for frame in frames])
        attended: Tensor = self.proj(rearrange(out, "f 1 (h w) c -> f c h w", h=x.shape[2]))
        return attended


class Downsample(CausalLayer):
    """Halves height and width and, with `time`, the frames after the clip's first."""

    def __init__(self, channels: int, *, time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2))
        self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1)) if time else None

    def forward(self, x: Tensor, cache: ChunkCache) -> Tensor:
        x = _frame_by_frame(self.resample, x)
        if self.time_conv is None:
            return x
        past = cache.recall(self, x)
        cache.keep(self, x[:, :, -1:])
        if past is None:
            return x
        halved: Tensor = self.time_conv(torch.cat([past, x], dim=2))
        return halved


class Upsample(CausalLayer):
    """Doubles height and width, halves the channels and, with `time`, doubles the frames of all but the first chunk.

    The convolution over time never sees the first latent: in the second chunk its past is zeros.
    """

    def __init__(self, channels: int, *, time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2, mode="nearest-exact"), nn.Conv2d(channels, channels // 2, 3, padding=1)
        )
        self.time_conv = CausalConv3d(channels, 2 * channels, (3, 1, 1)) if time else None

    def forward(self, x: Tensor, cache: ChunkCache) -> Tensor:
        if self.time_conv is not None and not cache.first:
            x = rearrange(self.time_conv(x, cache), "b (t c) f h w -> b c (f t) h w", t=2)
        return _frame_by_frame(self.resample, x)


def _attention(q_BNLK: Tensor, k_BNLK: Tensor, v_BNLK: Tensor, at_once: int) -> Tensor:
    """Attention with so many queries at once."""
    parts = [F.scaled_dot_product_attention(part, k_BNLK, v_BNLK) for part in q_BNLK.split(at_once, dim=2)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _format_of(x: Tensor) -> torch.memory_format:
    last = torch.channels_last_3d
    return last if x.is_contiguous(memory_format=last) else torch.contiguous_format


def _frame_by_frame(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a layer for pictures to each frame of [B, C, F, H, W]."""
    frames = layer(rearrange(x, "b c f h w -> (b f) c h w"))
    return rearrange(frames, "(b f) c h w -> b c f h w", b=len(x))
