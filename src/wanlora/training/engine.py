"""Processes, devices and the number format of the maths.

accelerate starts the processes and gives each its device; it wraps nothing. The base model is frozen, so the only
thing that processes exchange is one flat buffer of adapter gradients per step, summed. Each process has already
divided its losses by the number of batches in the whole step, so the sum is the mean over the step whatever the number
of processes.
"""

import os
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import Tensor

from wanlora.config.train import RunConfig
from wanlora.foundation.devices import find_device
from wanlora.foundation.dtypes import dtype_name, parse_dtype
from wanlora.foundation.errors import ConfigError
from wanlora.foundation.log import say_once
from wanlora.foundation.ranks import Rank


class Engine:
    """This process among its peers, and the device it computes on."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.device: torch.device = accelerator.device
        self.rank = Rank(accelerator.process_index, accelerator.num_processes)

    @classmethod
    def start(
        cls, config: RunConfig, *, log_with: list[str] | None = None, logging_dir: Path | None = None
    ) -> "Engine":
        """Join the processes that the launcher started. Raises `ConfigError` if they do not find each other."""
        refuse_lonely_ranks_before_joining()
        device = find_device(config.device)
        if device.index is not None:
            torch.cuda.set_device(device)  # the process takes the current card; a launcher gives each its own
        timeout = timedelta(minutes=config.ddp_timeout) if config.ddp_timeout else timedelta(minutes=30)
        accelerator = Accelerator(
            mixed_precision="no",  # the model states its own number formats; autocast would hide them
            cpu=device.type == "cpu",
            log_with=log_with or None,
            project_dir=None if logging_dir is None else str(logging_dir),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)],
        )
        check_ranks(accelerator.num_processes)
        return cls(accelerator)

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace every gradient by the sum over processes; a parameter without one counts as zero."""
        if self.rank.count == 1:
            return
        trained = list(parameters)
        for parameter in trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = torch.cat([parameter.grad.flatten() for parameter in trained if parameter.grad is not None])
        torch.distributed.all_reduce(flat)
        offset = 0
        for parameter in trained:
            assert parameter.grad is not None
            parameter.grad.copy_(flat[offset : offset + parameter.numel()].view_as(parameter))
            offset += parameter.numel()

    def sum(self, values: Tensor) -> Tensor:
        """The elementwise sum over processes."""
        if self.rank.count > 1:
            torch.distributed.all_reduce(values)
        return values

    def from_main(self, value: Any) -> Any:
        """What the main process holds, on every process."""
        if self.rank.count == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def gather_objects(self, value: Any) -> list[Any]:
        """The value of every process, in order of rank."""
        if self.rank.count == 1:
            return [value]
        values: list[Any] = [None] * self.rank.count
        torch.distributed.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Until every process is here."""
        self.accelerator.wait_for_everyone()

    def close(self) -> None:
        """Leave the other processes in order; skipping this aborts some runs at exit."""
        self.accelerator.end_training()


def refuse_lonely_ranks_before_joining() -> None:
    """Name the launches that start several processes which cannot find each other."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and "RANK" not in os.environ:
        raise ConfigError(
            f"the launcher announced {world} processes but gave this one no rank; "
            f"start with `accelerate launch --multi_gpu --num_processes {world} wan_train_network.py …`"
        )


def check_ranks(joined: int) -> None:
    """Stop a launch whose processes would each believe to be the only one and write the same files."""
    announced = int(os.environ.get("WORLD_SIZE", "1"))
    if announced != joined:
        raise ConfigError(
            f"the launcher started {announced} processes, but this one sees {joined}: each would train alone and "
            f"overwrite the others' files. Start with `accelerate launch --multi_gpu --num_processes {announced} "
            "wan_train_network.py …`, or with one process"
        )


def compute_dtype(mixed_precision: str | None, file_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The number format of the matrix products.

    `mixed_precision` is the flag, or what the launcher was told; "no" and unset keep the checkpoint's own format
    (bfloat16 for fp8 files). The adapter's weights are float32 in any case.
    """
    chosen = mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if chosen == "fp16" and device.type == "cpu":
        raise ConfigError("--mixed_precision fp16 needs a CUDA card; use bf16 or no")
    if chosen in {"bf16", "fp16"}:
        return parse_dtype(chosen)
    if chosen != "no":
        raise ConfigError(f"the launcher asks for mixed precision {chosen!r}; use --mixed_precision bf16, fp16 or no")
    kept = torch.bfloat16 if file_dtype.itemsize == 1 else file_dtype
    if kept is not torch.float32:
        say_once(f"no mixed precision asked for: maths stay in the checkpoint's own format, {dtype_name(kept)}")
    return kept


def set_backends(config: RunConfig) -> None:
    """The switches of torch that a run may turn on."""
    if config.cuda_allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    if config.cuda_cudnn_benchmark:
        torch.backends.cudnn.benchmark = True
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
