"""How much time blocks spare by what they keep, compared by the bytes that it takes.

A block that keeps the result of attention spares more for each byte than one that keeps all products: 0.8 against 0.24
milliseconds of a 14B model's step for each byte a token and element of the width (7,488 tokens, H100). So attention in
all blocks, then products in as many as fit, is the best use of memory, but for what does not come out even: a block
that keeps products where two could have kept attention may be worth more. Which is better is for `time_spared` to say.
"""

_ATTENTION, _PRODUCTS = 0.8, 0.24
"""Spared for each byte of the result of attention, and for each byte beyond that."""


def time_spared(blocks: int, attention: int, *, products_bytes: float, attention_bytes: float) -> float:
    """What a mix spares against recomputing everything, in the same unit for all mixes of one size.

    `blocks` keep products, `attention` others the result of attention; bytes are those of one block beside its input.
    """
    of_attention = _ATTENTION * attention_bytes
    of_products = of_attention + _PRODUCTS * (products_bytes - attention_bytes)
    return blocks * of_products + attention * of_attention
