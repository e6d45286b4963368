"""Fp8 weights a second time, transposed, where memory is left over.

Backward of a layer that multiplies in eight bits needs its weight transposed (`fast_linear.py`). Made anew in each
backward it costs a pass over the weight, 3 % of a step of the 14B model at 3,744 tokens and more of a smaller one; kept
it costs as many bytes as the weights, 13 GiB. The numbers are the same to the bit, so the copies can be dropped between
any two passes. All layers have one or none: blocks share a compiled graph, and a graph reads the copies or makes them.
"""

from collections.abc import Iterable, Sequence

from wanlora.quantization.fast_linear import FastFp8Linear


class TransposedWeights:
    """The transposed weights of layers, given in groups of those that get one input; none are kept until `keep`."""

    def __init__(self, groups: Iterable[Sequence[FastFp8Linear]]) -> None:
        self.groups = tuple(groups)

    @property
    def num_bytes(self) -> int:
        """What they take now."""
        layers = (layer for group in self.groups for layer in group)
        return sum(layer.across.numel() for layer in layers if layer.across is not None)

    @property
    def are_kept(self) -> bool:
        """Whether there are any."""
        return self.num_bytes > 0

    def keep(self) -> None:
        """Make them, one group after another; an error leaves none."""
        try:
            for group in self.groups:
                if len(group) > 1:
                    FastFp8Linear.transpose_together(group)
                else:
                    group[0].transpose()
        except BaseException:
            self.drop()
            raise

    def drop(self) -> None:
        """Free their memory, between passes; backward transposes again."""
        for group in self.groups:
            for layer in group:
                layer.forget_transposed()
