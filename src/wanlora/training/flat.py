"""All trained factors as one long vector for the optimizer.

A LoRA has hundreds of small matrices (800 in the 14B model), and an optimizer that treats them one by one spends most
of its time on being called: measured on an H100, bitsandbytes' AdamW takes 63 ms a step for them, most of it while the
card waits, where the update itself takes one. Laid end to end they are one tensor, and every operation on weights,
gradients and states happens once. That is the same update for optimizers that treat each number by itself.

The factors stay what they are for the model, for saving and for autograd: views of the vector. Gradients are collected
behind the backward passes of a step, so they take no memory while activations do. Where passes are replayed
(`graphs.py`), gradients cannot stay where a pass has left them; they are then added up, pass by pass, in a vector that
stays where it is.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class FlatParameters:
    """Trained parameters of one kind and device, end to end in `vector`, whose gradient `collect` makes of theirs.

    From here on the parameters are views of the vector: whoever changes one changes the other.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = tuple(parameters)
        self.vector = nn.Parameter(torch.cat([parameter.detach().flatten() for parameter in parameters]))
        for parameter, part in zip(self.parameters, self._parts(self.vector.data), strict=True):
            parameter.data = part
        self.sum: Tensor | None = None
        """The gradient of the passes so far, where they are added up."""

    def add_up(self, wanted: bool) -> None:
        """From now on add gradients up after every pass, or not. What has been left so far goes along."""
        if wanted and self.sum is None:
            self.sum = torch.zeros_like(self.vector.data)
            self.end_pass()
        elif not wanted:
            self.sum = None

    def begin_step(self) -> None:
        """Nothing has been added up."""
        if self.sum is not None:
            self.sum.zero_()

    def end_pass(self) -> None:
        """Add the gradients that a pass has left to the sum, and forget them; nothing where they are collected."""
        if self.sum is None:
            return
        parts = zip(self._parts(self.sum), self.parameters, strict=True)
        pairs = [(part, parameter.grad) for part, parameter in parts if parameter.grad is not None]
        if pairs:
            torch._foreach_add_([part for part, _ in pairs], [gradient for _, gradient in pairs])
        self.drop()

    def collect(self) -> None:
        """Move the parameters' gradients into the vector's; one without a gradient counts as zero."""
        if self.sum is not None:
            self.vector.grad = self.sum
            return
        gradients = [
            torch.zeros_like(parameter) if parameter.grad is None else parameter.grad for parameter in self.parameters
        ]
        self.vector.grad = torch.cat([gradient.flatten() for gradient in gradients])
        self.drop()

    def drop(self) -> None:
        """Forget the parameters' gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def _parts(self, vector: Tensor) -> Iterator[Tensor]:
        sizes = [parameter.numel() for parameter in self.parameters]
        for parameter, part in zip(self.parameters, vector.split(sizes), strict=True):
            yield part.view_as(parameter)


class FlatGroups:
    """The parameter groups of an optimizer, each as one vector."""

    def __init__(self, groups: Sequence[dict[str, Any]]) -> None:
        self.members = [FlatParameters(group["params"]) for group in groups]
        self.groups = [{**group, "params": [member.vector]} for group, member in zip(groups, self.members, strict=True)]

    @property
    def vectors(self) -> list[nn.Parameter]:
        """What the optimizer sees."""
        return [member.vector for member in self.members]

    def add_up(self, wanted: bool) -> None:
        """From now on add gradients up after every pass, or not. Between passes only."""
        for member in self.members:
            member.add_up(wanted)

    def begin_step(self) -> None:
        """Nothing has been added up."""
        for member in self.members:
            member.begin_step()

    def end_pass(self) -> None:
        """Take what a pass has left, where gradients are added up."""
        for member in self.members:
            member.end_pass()

    def collect(self) -> None:
        """Move all gradients into the vectors'."""
        for member in self.members:
            member.collect()

    def drop(self) -> None:
        """Forget the gradients of all parameters."""
        for member in self.members:
            member.drop()
