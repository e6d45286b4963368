"""The driver makes PyTorch's own context on a card, before PyTorch is imported."""

import pytest

from tests.fresh import run_fresh

pytestmark = pytest.mark.gpu


def test_the_context_that_is_made_meanwhile_is_the_one_that_pytorch_uses() -> None:
    """In a process of its own: here the card has been used."""
    code = (
        "import ctypes, sys\n"
        "from wanlora.foundation import driver\n"
        "assert driver._make_context(0) and 'torch' not in sys.modules\n"
        "flags, active = ctypes.c_uint(), ctypes.c_int()\n"
        "state = driver._find_cards().cuDevicePrimaryCtxGetState\n"
        "assert state(0, ctypes.byref(flags), ctypes.byref(active)) == 0 and active.value == 1\n"
        "import torch\n"
        "free, total = torch.cuda.mem_get_info(0)\n"
        "assert (torch.ones(3, device='cuda:0') * 2).sum().item() == 6\n"
        "assert free - torch.cuda.mem_get_info(0)[0] < 200 * 2**20  # a second context would take more\n"
    )
    run_fresh(code)
