"""What the first step would load, loaded while the model is read.

A card's libraries for products and attention are loaded, and their handles made, when they are first called, once for
the forward pass and once for the thread of the backward pass: half a second and more in which nothing else happens. A
miniature of what a block does, on zeros, has them ready. It draws no random number and its results are thrown away.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from einops import rearrange

from wanlora.foundation.meanwhile import meanwhile
from wanlora.models.attention import attention

_TOKENS, _TEXT, _WIDTH, _HEADS = 512, 64, 256, 2


@contextmanager
def warming_up(device: torch.device, dtype: torch.dtype, kernel: str) -> Iterator[None]:
    """Let a thread use a card for products and the attention `kernel` in `dtype`; a CPU has nothing to load."""
    if device.type != "cuda":
        yield
        return
    card = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    with meanwhile(lambda: compute_a_little(card, dtype, kernel)):
        yield


def compute_a_little(device: torch.device, dtype: torch.dtype, kernel: str) -> None:
    """A product, attention to itself and to a padded text, forward and backward."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # of this thread
    x_LD = torch.zeros(_TOKENS, _WIDTH, device=device, dtype=dtype, requires_grad=True)
    q_BLNK = rearrange(F.linear(x_LD, x_LD[:_WIDTH]), "l (n k) -> 1 l n k", n=_HEADS)
    text_BTNK = q_BLNK[:, :_TEXT]
    out_BLNK = attention(q_BLNK, q_BLNK, q_BLNK, kernel)
    out_BLNK = out_BLNK + attention(q_BLNK, text_BTNK, text_BTNK, kernel, alike=_TOKENS)
    out_BLNK.float().square().sum().backward()
