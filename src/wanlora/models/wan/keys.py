"""Names of tensors: from what a file calls them to the official names, and between the official and Diffusers' names.

The two namings map one to one, module by module, so the same functions serve tensors (`blocks.0.ffn.0.weight`) and
modules (`blocks.0.ffn.0`, as adapter files name their targets). Naming trap: the affine norm before cross attention is
`norm3` officially and `norm2` in Diffusers.
"""

import re
from collections.abc import Iterable

_TOP = {
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
_ATTENTION = {
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "o": "to_out.0",
    "k_img": "add_k_proj",
    "v_img": "add_v_proj",
    "norm_k_img": "norm_added_k",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
}
_BLOCK = {
    **{f"self_attn.{ours}": f"attn1.{theirs}" for ours, theirs in _ATTENTION.items()},
    **{f"cross_attn.{ours}": f"attn2.{theirs}" for ours, theirs in _ATTENTION.items()},
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "modulation": "scale_shift_table",
    "before_proj": "proj_in",
    "after_proj": "proj_out",
}
_TOP_BACK = {theirs: ours for ours, theirs in _TOP.items()}
_BLOCK_BACK = {theirs: ours for ours, theirs in _BLOCK.items()}

_IN_BLOCK = re.compile(r"^((?:vace_)?blocks\.\d+\.)(.+)$")
_PATCH_EMBEDDING = re.compile(r"^(.*\.)?patch_embedding\.weight$")
_OFFICIAL_MARK = "head.modulation"
_DIFFUSERS_MARK = "condition_embedder.time_embedder.linear_1.weight"


def official_to_diffusers(name: str) -> str:
    """The Diffusers name of an official tensor or module; a name outside the map stays as it is."""
    return _translate(name, _TOP, _BLOCK)


def diffusers_to_official(name: str) -> str:
    """The official name of a Diffusers tensor or module; a name outside the map stays as it is."""
    return _translate(name, _TOP_BACK, _BLOCK_BACK)


def find_prefix(names: Iterable[str]) -> tuple[str, str] | None:
    """Where in a file the transformer is, and how it is named: (prefix, "official" or "diffusers").

    None if the file holds no Wan transformer. Repackaged files put everything under `model.diffusion_model.` or the
    like; any prefix is taken under which both the patch embedding and a layout's own tensor are found.
    """
    known = set(names)
    for name in sorted(known, key=len):
        if match := _PATCH_EMBEDDING.match(name):
            prefix = match[1] or ""
            for layout, mark in (("official", _OFFICIAL_MARK), ("diffusers", _DIFFUSERS_MARK)):
                if prefix + mark in known:
                    return prefix, layout
    return None


def _translate(name: str, top: dict[str, str], block: dict[str, str]) -> str:
    match = _IN_BLOCK.match(name)
    head, rest, table = (match[1], match[2], block) if match else ("", name, top)
    parts = rest.split(".")
    for end in range(len(parts), 0, -1):
        module = ".".join(parts[:end])
        if module in table:
            return head + ".".join((table[module], *parts[end:]))
    return name
