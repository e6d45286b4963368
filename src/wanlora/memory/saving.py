"""What a compiled block saves for its backward.

A compiler sees the forward and the backward of a block as one graph and may cut it where it likes: what crosses the cut
is saved, what lies behind it is computed again inside the backward, together with it and without what only the output
needs. Three cuts are worth having:

- `everything`: the compiler's own choice, all that it would not compute again for free: 50 bytes for each token and
  element of the stream.
- `products`: results of matrix products, attention and sums over a row; norms, modulation, rotation and activations are
  computed again. Half of the bytes, for 4 % of the time.
- `attention`: the block's input and the result of attention. All products but the last are computed again. That is
  recomputing a block without its dearest part, and cheaper than calling its forward a second time.

Random numbers are never drawn twice: masks of dropout are saved. Only torch's own compiler takes such wishes.
"""

import re
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.fx import Graph, Node
from torch.utils.checkpoint import CheckpointPolicy

Save = Literal["everything", "products", "attention"]

_ATTENTION = re.compile(r"attention|flash|fmha")
_READS = 5
"""A result that is used again is computed again if that takes so many reads at most; torch's own number is 4.

A gradient that comes back through the rotary embedding and a norm's weight takes five: both elements of a pair, cosine,
sine, weight. Stored between the two passes over its row it would be a write of 4 bytes for each element of queries and
keys, and their reads come from the cache.
"""
_RANDOM = re.compile(r"rand|dropout|bernoulli|philox|seed")


def saving_backend(save: Save, mode: str | None) -> Callable[..., Any]:
    """A backend for `torch.compile` that cuts graphs as `save` says; `mode` is that of `torch.compile`."""

    def compile_graph(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        import torch._functorch.config as partitioning
        from torch._inductor import list_mode_options
        from torch._inductor.compile_fx import compile_fx

        options = {"realize_reads_threshold": _READS, **(list_mode_options(mode) if mode else {})}
        if save == "everything":
            return compile_fx(graph, inputs, config_patches=options)
        options = {**options, "joint_custom_post_pass": _marking_pass(save)}
        with partitioning.patch(aggressive_recomputation=True):
            return compile_fx(graph, inputs, config_patches=options)

    return compile_graph


def _marking_pass(save: Save) -> Any:
    """`mark` as the compiler wants it; its own import takes a second, so it waits until something is compiled."""
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class Marking(CustomGraphPass):
        def __call__(self, graph: Graph) -> None:
            mark(graph, save)

        def uuid(self) -> str:
            return f"wanlora saves {save} 1"

    return Marking()


def mark(graph: Graph, save: Save) -> None:
    """Say of the operations of a joint graph's forward which results are saved and which are computed again."""
    for node in graph.nodes:
        if node.op != "call_function" or node.meta.get("partitioner_tag") == "is_backward":
            continue
        if _is_attention(node):
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
        elif save == "attention" and not _is_attention_result(node) and not _RANDOM.search(str(node.target)):
            node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE


def _is_attention(node: Node) -> bool:
    name = str(node.target)
    return _ATTENTION.search(name) is not None and "backward" not in name


def _is_attention_result(node: Node) -> bool:
    """Whether a node takes one of several results of attention."""
    source = node.args[0] if node.args else None
    return isinstance(source, Node) and source.op == "call_function" and _is_attention(source)
