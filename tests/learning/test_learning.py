"""The trainer teaches the shipped Wan something, and whatever would keep it from learning is noticed.

Shapes, files and losses can all look right while nothing useful is learned. So the real programs train for some steps,
and an evaluator that shares no code with them finds the loss lower on other clips. Then faults of that kind are
planted, one at a time: each must make the same requirement fail.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.learning.evaluator import Evaluator
from tests.learning.trial import FILES, SEEDS, Trial, read_golden, require_learning
from wanlora.lora.network import LoRANetwork
from wanlora.models.wan import vae
from wanlora.quantization import installer
from wanlora.training import objective

Patch = pytest.MonkeyPatch


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    return Evaluator(FILES)


@pytest.fixture(scope="module")
def base_loss(evaluator: Evaluator) -> float:
    return evaluator.loss()


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Trial:
    """Clips with their caches, as they should be."""
    trial = Trial(folder=tmp_path_factory.mktemp("learning"))
    trial.cache()
    return trial


@pytest.fixture
def patch() -> Iterator[Patch]:
    with Patch.context() as context:
        yield context


def judge(evaluator: Evaluator, base_loss: float, trial: Trial, spoil: Callable[[Path], None] | None = None) -> None:
    """Train with each seed and require that it was learned; `spoil` may change the LoRA files before they are read."""
    files = [trial.train(seed) for seed in SEEDS]
    if spoil:
        for file in files:
            spoil(file)
    require_learning(base_loss, [evaluator.loss(file) for file in files], read_golden())


def test_the_loss_on_other_clips_falls(evaluator: Evaluator, base_loss: float, cached: Trial) -> None:
    judge(evaluator, base_loss, cached)


def test_another_base_is_noticed(evaluator: Evaluator, base_loss: float) -> None:
    golden = read_golden()
    with pytest.raises(AssertionError, match="recorded"):
        require_learning(golden.base_loss * 1.03, [0.0, 0.0, 0.001], golden)


def flipped_target(patch: Patch) -> None:
    patch.setattr(objective, "velocity", lambda x0, x1: x0 - x1)


def shifted_timestep(patch: Patch) -> None:
    right = objective.model_timestep
    patch.setattr(objective, "model_timestep", lambda t_B: right(t_B) + 100)


def dead_adapter(patch: Patch) -> None:
    right = LoRANetwork.groups

    def copies(network: LoRANetwork, lr: float, ratio: float | None = None) -> list[dict[str, object]]:
        groups = right(network, lr, ratio)
        return [group | {"params": [torch.nn.Parameter(p.clone()) for p in group["params"]]} for group in groups]

    patch.setattr(LoRANetwork, "groups", copies)


def unscaled_fp8_weight(patch: Patch) -> None:
    right, calls = installer.quantize_blockwise, []

    def forgetful(weight: Tensor, *block: int) -> tuple[Tensor, Tensor]:
        calls.append(weight)
        quantised, scale = right(weight, *block)
        return quantised, torch.ones_like(scale) if len(calls) == 8 else scale

    patch.setattr(installer, "quantize_blockwise", forgetful)


@pytest.mark.slow
@pytest.mark.parametrize("fault", [flipped_target, shifted_timestep, dead_adapter, unscaled_fp8_weight])
def test_a_fault_in_training_is_noticed(
    fault: Callable[[Patch], None], evaluator: Evaluator, base_loss: float, cached: Trial, patch: Patch
) -> None:
    fault(patch)
    with pytest.raises(AssertionError, match="the loss falls by"):
        judge(evaluator, base_loss, cached)


@pytest.mark.slow
def test_an_alpha_that_is_lost_in_the_file_is_noticed(evaluator: Evaluator, base_loss: float, cached: Trial) -> None:
    def lose_alpha(file: Path) -> None:
        tensors = load_file(file)
        kept = {name: tensor.clone() for name, tensor in tensors.items() if not name.endswith(".alpha")}
        assert len(kept) < len(tensors)
        save_file(kept, file)

    with pytest.raises(AssertionError, match="the loss falls by"):
        judge(evaluator, base_loss, cached, lose_alpha)


@pytest.mark.slow
@pytest.mark.parametrize("also_in_training", [False, True], ids=["in caching", "in caching and training"])
def test_a_wrong_normalisation_is_noticed(
    also_in_training: bool, evaluator: Evaluator, base_loss: float, tmp_path: Path, patch: Patch
) -> None:
    trial = Trial(folder=tmp_path)
    with Patch.context() as caching:
        unnormalised(caching)
        trial.cache()
    if also_in_training:
        unnormalised(patch)
    with pytest.raises(AssertionError, match="the loss falls by"):
        judge(evaluator, base_loss, trial)


def unnormalised(patch: Patch) -> None:
    """Latents are left as the autoencoder makes them."""
    patch.setattr(vae, "VAE_MEAN", (0.0,) * 16)
    patch.setattr(vae, "VAE_STD", (1.0,) * 16)
