"""All trained factors as one long vector for the optimizer.

A LoRA has hundreds of small matrices (800 in the 14B model), and an optimizer that treats them one by one spends most
of its time on being called: measured on an H100, bitsandbytes' AdamW takes 63 ms a step for them, most of it while the
card waits, where the update itself takes one. Laid end to end they are one tensor, and every operation on weights,
gradients and states happens once. That is the same update for optimizers that treat each number by itself.

The factors stay what they are for the model, for saving and for autograd: views of the vector. Gradients are collected
behind the backward passes of a step, so they take no memory while activations do. Where passes are replayed
(`graphs.py`), gradients cannot stay where a pass has left them; they are then added up, pass by pass, in a vector that
stays where it is.

Where the products are computed in a narrower format than float32, a step's passes read the factors from a second vector
in that format (`lora/narrow.py`), and leave narrow gradients. They are widened while they are laid end to end; those of
several passes are added up in float32, as autograd adds them up.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from wanlora.lora.narrow import NarrowFactors, parts_of
from wanlora.lora.network import LoRANetwork


class FlatParameters:
    """Trained parameters of one kind and device, end to end in `vector`, whose gradient `collect` makes of theirs.

    From here on the parameters are views of the vector: whoever changes one changes the other. If a `network` of theirs
    is given that computes in a `dtype` narrower than float32, there are copies in that, for the passes of a step.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        network: LoRANetwork | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.parameters = tuple(parameters)
        self.vector = nn.Parameter(torch.cat([parameter.detach().flatten() for parameter in parameters]))
        for parameter, part in zip(self.parameters, parts_of(self.vector.data, self.parameters), strict=True):
            parameter.data = part
        self.narrow: NarrowFactors | None = None
        if network is not None and dtype.itemsize < self.vector.dtype.itemsize:
            self.narrow = NarrowFactors(network, self.parameters, self.vector, dtype)
        self.sum: Tensor | None = None
        """The gradient of the passes so far, where they are added up."""
        self._sum_stays = False

    @property
    def leaves(self) -> Sequence[nn.Parameter]:
        """Where backward leaves gradients."""
        return self.narrow.leaves if self.narrow else self.parameters

    def add_up(self, wanted: bool) -> None:
        """From now on add gradients up after every pass, or not. What has been left so far goes along."""
        self._sum_stays = wanted
        if wanted and self.sum is None:
            self.sum = torch.zeros_like(self.vector.data)
            self.end_pass()
        elif not wanted:
            self.sum = None

    def begin_step(self, num_passes: int) -> None:
        """Nothing has been added up. Narrow gradients of more than one pass will be, in float32."""
        if self.sum is not None:
            self.sum.zero_()
        elif self.narrow and num_passes > 1:  # narrow gradients would be added up in their own format
            self.sum = torch.zeros_like(self.vector.data)

    def end_pass(self) -> None:
        """Add the gradients that a pass has left to the sum, and forget them; nothing where they are collected."""
        if self.sum is not None:
            self.sum += self._taken()

    def collect(self) -> None:
        """Move the parameters' gradients into the vector's; one without a gradient counts as zero."""
        self.vector.grad = self._taken() if self.sum is None else self.sum
        if not self._sum_stays:
            self.sum = None

    def drop(self) -> None:
        """Forget the parameters' gradients."""
        for leaf in self.leaves:
            leaf.grad = None

    def _taken(self) -> Tensor:
        """What passes have left, as the gradient of the vector; the parameters forget it."""
        gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in self.leaves]
        taken = torch.empty_like(self.vector.data)
        torch._foreach_copy_(list(parts_of(taken, self.leaves)), gradients)  # narrow ones are widened as they are read
        del gradients
        self.drop()
        if self.narrow:
            self.narrow.strengthen(taken)
        return taken


class FlatGroups:
    """The parameter groups of an optimizer, each as one vector; `network` and `dtype` as of `FlatParameters`."""

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        network: LoRANetwork | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.members = [FlatParameters(group["params"], network, dtype) for group in groups]
        self.groups = [{**group, "params": [member.vector]} for group, member in zip(groups, self.members, strict=True)]

    @property
    def vectors(self) -> list[nn.Parameter]:
        """What the optimizer sees."""
        return [member.vector for member in self.members]

    def add_up(self, wanted: bool) -> None:
        """From now on add gradients up after every pass, or not. Between passes only."""
        for member in self.members:
            member.add_up(wanted)

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Within the block narrow copies of the factors, as they are now, are computed with; around a step's passes."""
        with ExitStack() as stack:
            for member in self.members:
                if member.narrow:
                    stack.enter_context(member.narrow.lent())
            yield

    def begin_step(self, num_passes: int) -> None:
        """Nothing has been added up."""
        for member in self.members:
            member.begin_step(num_passes)

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
