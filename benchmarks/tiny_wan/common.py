"""What the two trainings share: a clock that the learning rate follows, averaged weights, files, contact sheets."""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from wanlora.foundation.files import atomic_path

Frames = NDArray[np.uint8]


class Clock:
    """A share of a time budget; the learning rate is a function of it, so any stop leaves a finished model."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.start = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self.start

    @property
    def share(self) -> float:
        """How much of the budget is spent, from 0 to 1."""
        return min(1.0, self.elapsed / self.seconds)


def learning_rate(peak: float, step: int, share: float, warmup: int = 200) -> float:
    """A linear rise over `warmup` steps, a cosine down to 1 % at the end of the budget."""
    return peak * min(1.0, (step + 1) / warmup) * (0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * share)))


class Average:
    """An exponential moving average of a model's parameters."""

    def __init__(self, models: Sequence[nn.Module], decay: float) -> None:
        self.decay = decay
        self.live = [parameter for model in models for parameter in model.parameters()]
        self.kept = [parameter.detach().clone() for parameter in self.live]
        self.num_updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters as they are now."""
        self.num_updates += 1
        decay = min(self.decay, self.num_updates / (self.num_updates + 10))
        torch._foreach_lerp_(self.kept, [parameter.detach() for parameter in self.live], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the averages and the live parameters; a second call undoes the first."""
        for kept, live in zip(self.kept, self.live, strict=True):
            kept_copy = kept.clone()
            kept.copy_(live)
            live.copy_(kept_copy)


def in_bf16(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As they are stored."""
    return {name: tensor.detach().to("cpu", torch.bfloat16).contiguous() for name, tensor in tensors.items()}


def contact_sheet(path: Path, rows: Sequence[Sequence[Frames]], columns: int = 6, enlarge: int = 2) -> None:
    """Clips below each other, `columns` frames of each; clips of one row stand beside each other."""
    lines = [np.concatenate([_strip(frames, columns) for frames in row], axis=1) for row in rows]
    width = max(line.shape[1] for line in lines)
    padded = [np.pad(line, ((0, 2), (0, width - line.shape[1]), (0, 0)), constant_values=255) for line in lines]
    sheet = Image.fromarray(np.concatenate(padded))
    with atomic_path(path) as temporary:
        sheet.resize((sheet.width * enlarge, sheet.height * enlarge), Image.Resampling.NEAREST).save(temporary)


def _strip(frames: Frames, columns: int) -> Frames:
    indices = np.unique(np.linspace(0, len(frames) - 1, columns).round().astype(int))
    strip = np.concatenate(
        [np.pad(frames[index], ((0, 0), (0, 2), (0, 0)), constant_values=255) for index in indices], 1
    )
    return strip.astype(np.uint8)
