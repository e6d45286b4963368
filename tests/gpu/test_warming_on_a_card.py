"""Warming up loads what a step uses and leaves the card as it was."""

import pytest

from tests.fresh import run_fresh

pytestmark = pytest.mark.gpu


def test_libraries_are_loaded_by_another_thread_and_no_number_is_drawn() -> None:
    """In a process of its own: here they have been loaded long ago."""
    code = (
        "import torch\n"
        "from wanlora.memory.compile import does_without_compiler\n"
        "from wanlora.training import warming\n"
        "does_without_compiler(recomputes=True)\n"
        "card, done = torch.device('cuda'), []\n"
        "state = torch.cuda.get_rng_state()\n"
        "work = warming.compute_a_little\n"
        "warming.compute_a_little = lambda *arguments: (work(*arguments), done.append(True))\n"
        "with warming.warming_up(card, torch.bfloat16, 'sdpa'):\n"
        "    loaded = torch.ones(1 << 20, device=card)\n"
        "torch.cuda.synchronize()\n"
        "assert done and loaded.sum().item() == 1 << 20\n"
        "assert torch.equal(torch.cuda.get_rng_state(), state)\n"
        "assert torch.cuda.memory_allocated() < 256 * 2**20  # workspaces of the libraries\n"
        "libraries = open('/proc/self/maps').read()\n"
        "assert 'libcublasLt' in libraries\n"
        "assert torch.cuda.get_device_capability() < (9, 0) or 'libcudnn_engines' in libraries\n"
    )
    run_fresh(code)
