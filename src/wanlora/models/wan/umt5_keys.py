"""Tensor names of UMT5: official, and as transformers and ComfyUI spell them."""

import re

_OFFICIAL = re.compile(r"^(?:encoder\.)?((?:token_embedding|blocks\.\d+|norm)\..+)$")
_EMBEDDING = re.compile(r"^(?:shared|encoder\.embed_tokens)\.(.+)$")
_NORM = re.compile(r"^(?:encoder\.)?final_layer_norm\.(.+)$")
_BLOCK = re.compile(r"^(?:encoder\.)?block\.(\d+)\.layer\.([01])\.(.+)\.([^.]+)$")
_IGNORED = re.compile(r"^(?:spiece_model|scaled_fp8|decoder\..*|lm_head\..*)$")
_IN_BLOCK = {
    ("0", "layer_norm"): "norm1",
    ("1", "layer_norm"): "norm2",
    **{("0", f"SelfAttention.{part}"): f"attn.{part}" for part in "qkvo"},
    ("0", "SelfAttention.relative_attention_bias"): "pos_embedding.embedding",
    ("1", "DenseReluDense.wi_0"): "ffn.gate.0",
    ("1", "DenseReluDense.wi_1"): "ffn.fc1",
    ("1", "DenseReluDense.wo"): "ffn.fc2",
}
_QUANTISATION = ("scale_weight", "weight_scale", "scale_input", "input_scale", "comfy_quant")


def official_name(name: str) -> str | None:
    """The official name of a tensor; None for what the encoder does not need.

    Not needed are the decoder of a full model, an embedded tokenizer, and what goes with fp8 weights. A name of neither
    spelling is given back as it is.
    """
    if _IGNORED.match(name) or name.rpartition(".")[2] in _QUANTISATION:
        return None
    if match := _OFFICIAL.match(name):
        return match[1]
    if match := _EMBEDDING.match(name):
        return f"token_embedding.{match[1]}"
    if match := _NORM.match(name):
        return f"norm.{match[1]}"
    if (match := _BLOCK.match(name)) and (match[2], match[3]) in _IN_BLOCK:
        return f"blocks.{match[1]}.{_IN_BLOCK[match[2], match[3]]}.{match[4]}"
    return name
