"""Gradients that are laid end to end on a card: widened on the way, by few kernels."""

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from tests.gpu.test_graphs_on_a_card import SMALL, Run

pytestmark = pytest.mark.gpu


def test_narrow_gradients_are_widened_by_few_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as matrices would be launched if torch did not take them for a list that it copies at once."""
    run = Run(replays=False, dtype=torch.bfloat16)
    flat = run.step.flat
    assert flat is not None
    (member,) = flat.members
    collect, kernels = flat.collect, list[str]()

    def watched() -> None:
        assert member.narrow and len(member.leaves) > 50
        gradients = [leaf.grad for leaf in member.leaves]
        expected = torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])
        assert expected.dtype == torch.bfloat16
        expected = expected.float()
        member.narrow.strengthen(expected)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            collect()
            torch.cuda.synchronize()
        kernels.extend(event.name for event in seen.events() if event.device_type == DeviceType.CUDA)
        assert member.vector.grad is not None and torch.equal(member.vector.grad, expected)

    monkeypatch.setattr(flat, "collect", watched)
    run.take([SMALL])
    assert 0 < len(kernels) < 10, kernels
