"""The Diffusers spelling of the Wan 2.1 VAE's tensor names."""

import re

_RULES = (
    (r"^conv1\.", "quant_conv."),
    (r"^conv2\.", "post_quant_conv."),
    (r"coder\.conv1\.", "coder.conv_in."),
    (r"\.head\.0\.", ".norm_out."),
    (r"\.head\.2\.", ".conv_out."),
    (r"\.middle\.0\.", ".mid_block.resnets.0."),
    (r"\.middle\.1\.", ".mid_block.attentions.0."),
    (r"\.middle\.2\.", ".mid_block.resnets.1."),
    (r"\.residual\.0\.", ".norm1."),
    (r"\.residual\.2\.", ".conv1."),
    (r"\.residual\.3\.", ".norm2."),
    (r"\.residual\.6\.", ".conv2."),
    (r"\.shortcut\.", ".conv_shortcut."),
    (r"\.downsamples\.", ".down_blocks."),
)
_UPSAMPLE = re.compile(r"\.upsamples\.(\d+)\.")
_LAYERS_PER_LEVEL = 4


def diffusers_name(name: str) -> str:
    """The name that Diffusers gives to the tensor officially called `name`."""
    for pattern, replacement in _RULES:
        name = re.sub(pattern, replacement, name)
    return _UPSAMPLE.sub(_up_block, name)


def _up_block(match: re.Match[str]) -> str:
    level, layer = divmod(int(match[1]), _LAYERS_PER_LEVEL)
    part = "upsamplers.0" if layer == _LAYERS_PER_LEVEL - 1 else f"resnets.{layer}"
    return f".up_blocks.{level}.{part}."
