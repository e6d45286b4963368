"""How many numbers adapters have."""

from wanlora.memory.resting import linear_sizes
from wanlora.models.wan.spec import WanSizes


def adapter_parameters(sizes: WanSizes, rank: int) -> int:
    """Trained numbers of one block whose linear layers all have an adapter of `rank`."""
    return sum(rank * (out + into) for out, into in linear_sizes(sizes).values())
