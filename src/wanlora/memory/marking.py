"""The pass that hands `saving.py`'s marks to torch's compiler.

A module of its own, because its import takes a second and waits until something is compiled, and because the compiler
keeps what it has compiled under a name made of all it was told: it must be able to pickle the pass.
"""

from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

from wanlora.memory.saving import Save, mark


class Marking(CustomGraphPass):
    """Marks a joint graph."""

    def __init__(self, save: Save) -> None:
        self.save = save

    def __call__(self, graph: Graph) -> None:
        mark(graph, self.save)

    def uuid(self) -> str:
        """What the compiler knows the pass by; another number where `mark` has changed."""
        return f"wanlora saves {self.save} 2"
