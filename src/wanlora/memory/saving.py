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

Weights are never saved in another shape than they have: a streamed block's lie somewhere else by then. Random numbers
are never drawn twice: masks of dropout are saved. Only torch's own compiler takes such wishes.
"""

import re
from typing import Literal

from torch._ops import OpOverload
from torch.fx import Graph, Node
from torch.utils.checkpoint import CheckpointPolicy

Save = Literal["everything", "products", "attention"]

_ATTENTION = re.compile(r"attention|flash|fmha")
_RANDOM = re.compile(r"rand|dropout|bernoulli|philox|seed")


def mark(graph: Graph, save: Save) -> None:
    """Say of the operations of a joint graph's forward which results are saved and which are computed again."""
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if _views_an_input(node):
            _mark_recomputed(node)
        elif node.meta.get("partitioner_tag") == "is_backward":
            continue
        elif save != "everything" and _is_attention(node):
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
        elif save == "attention" and not _is_attention_result(node) and not _RANDOM.search(str(node.target)):
            _mark_recomputed(node)


def _mark_recomputed(node: Node) -> None:
    node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
    node.meta["ac_graph_id"] = 0  # all of one checkpoint: torch 2.7 asks for it, later ones do not mind


def _views_an_input(node: Node) -> bool:
    """Whether a node is an input, a weight say, in another shape: old compilers save that in the input's place."""
    source = node.args[0] if node.args else None
    views = isinstance(node.target, OpOverload) and node.target.is_view
    return views and isinstance(source, Node) and (source.op == "placeholder" or _views_an_input(source))


def _is_attention(node: Node) -> bool:
    name = str(node.target)
    return _ATTENTION.search(name) is not None and "backward" not in name


def _is_attention_result(node: Node) -> bool:
    """Whether a node takes one of several results of attention."""
    source = node.args[0] if node.args else None
    return isinstance(source, Node) and source.op == "call_function" and _is_attention(source)
