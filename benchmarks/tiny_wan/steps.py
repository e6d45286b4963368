"""Training steps of the autoencoder that a card can run at its own pace.

A step is thousands of small kernels, so their launches would cost more than the work: a step of each size is recorded
once as a CUDA graph and then replayed. Which number format, memory layout and kind of convolution is fastest differs
between cards and releases, so it is measured.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from wanlora.models.wan.vae_layers import CausalConv3d, ChunkCache

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """One way to compute a step."""

    bfloat16: bool = False
    layout: torch.memory_format = torch.contiguous_format
    planes: bool = False
    """Convolve pictures whose channels are those of three frames, instead of clips."""


WAYS = (
    Way(layout=torch.channels_last_3d),
    Way(planes=True, layout=torch.channels_last_3d),
    Way(planes=True),
    Way(planes=True, layout=torch.channels_last_3d, bfloat16=True),
)


@contextmanager
def convolutions(way: Way) -> Iterator[None]:
    """The autoencoder's causal convolutions as `way` wants them: the same function."""
    ordinary = CausalConv3d.forward
    if way.planes:
        CausalConv3d.forward = _convolve_planes  # type: ignore[method-assign]
    try:
        yield
    finally:
        CausalConv3d.forward = ordinary  # type: ignore[method-assign]


def _convolve_planes(self: CausalConv3d, x: Tensor, cache: ChunkCache) -> Tensor:
    clips, num_frames, reach = len(x), x.shape[2], self.kernel_size[0] - 1
    past = cache.recall(self, x)
    if past is not None:
        x = torch.cat([past, x], dim=2)
    cache.keep(self, x[:, :, -reach:])
    missing = reach + num_frames - x.shape[2]
    if num_frames == 1:
        weight = self.weight[:, :, missing:]
    else:
        weight = self.weight
        x = F.pad(x, (0, 0, 0, 0, missing, 0)) if missing else x
    windows = torch.cat([x[:, :, tap : tap + num_frames] for tap in range(weight.shape[2])], dim=1)
    out = F.conv2d(
        rearrange(windows, "b c f h w -> (b f) c h w"),
        rearrange(weight, "o c t h w -> o (t c) h w"),
        self.bias,
        padding=self.padding[1:],
    )
    return rearrange(out, "(b f) c h w -> b c f h w", b=clips)


class Steps:
    """Losses and gradients of batches; on a card each size is recorded at its first batch and replayed afterwards."""

    def __init__(self, model: nn.Module, loss: Loss, way: Way, device: torch.device) -> None:
        self.model, self.loss, self.way, self.device = model, loss, way, device
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        self._recorded: dict[tuple[object, ...], tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}

    def __call__(self, x_BCFHW: Tensor, mode: object = None) -> Tensor:
        """The loss; gradients lie in the parameters. Another `mode` of the model is another recording."""
        if self.device.type != "cuda":
            return self._run(x_BCFHW)
        key = (tuple(x_BCFHW.shape), mode)
        if key not in self._recorded:
            self._recorded[key] = self._record(x_BCFHW)
        graph, x_kept, loss = self._recorded[key]
        x_kept.copy_(x_BCFHW)
        graph.replay()
        return loss

    def _run(self, x_BCFHW: Tensor) -> Tensor:
        torch._foreach_zero_([parameter.grad for parameter in self.parameters])
        half = torch.autocast(self.device.type, torch.bfloat16) if self.way.bfloat16 else nullcontext()
        with convolutions(self.way), half:
            output = self.model(x_BCFHW.contiguous(memory_format=self.way.layout))
        loss = self.loss(output, x_BCFHW)
        loss.backward()
        return loss.detach()

    def _record(self, x_BCFHW: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        x_kept, stream = x_BCFHW.clone(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._run(x_kept)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = self._run(x_kept)
        return graph, x_kept, loss


def fastest(model: nn.Module, loss: Loss, x_BCFHW: Tensor, ways: Sequence[Way] = WAYS) -> Way:
    """The way whose recorded steps took the least time on this card."""
    times: dict[Way, float] = {}
    for way in ways:
        start = time.perf_counter()
        try:
            steps = Steps(model, loss, way, x_BCFHW.device)
            steps(x_BCFHW)
            times[way] = _seconds(steps, x_BCFHW)
        except RuntimeError as error:
            print(f"  {way}: {str(error)[:300]}", flush=True)
            continue
        print(f"  {way}: {times[way] * 1000:.1f} ms, {time.perf_counter() - start:.1f} s to find out", flush=True)
    return min(times, key=lambda way: times[way])


def _seconds(steps: Steps, x_BCFHW: Tensor) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(5):
        steps(x_BCFHW)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / 5
