"""The words that an out-of-memory error becomes, and pinned memory where there is no card."""

import torch

from wanlora.memory.measure import (
    MemoryFigures,
    MemorySettings,
    explain_out_of_memory,
    is_out_of_memory,
    memory_figures,
)
from wanlora.memory.pinned import is_page_locked, pinned_buffer, unpin

FIGURES = MemoryFigures(allocated=18.0, reserved=22.5, peak=23.1, total=24.0)


def settings(**changes: bool | int) -> MemorySettings:
    known = {"gradient_checkpointing": True, "offload": False, "fp8": True, "blocks_to_swap": 10, "num_blocks": 40}
    known |= {"retried": True}
    return MemorySettings(**{**known, **changes})  # type: ignore[arg-type]


def test_the_explanation_names_bucket_clips_figures_and_cures() -> None:
    clips = [f"clip_{number}" for number in range(6)]
    text = explain_out_of_memory(FIGURES, settings(), bucket="768x416x21", clips=clips)
    assert "768x416x21 (clip_0, clip_1, clip_2, clip_3 and 2 more)" in text
    assert "peak 23.1 of 24.0 GiB" in text and "4.5 GiB reserved but in no tensor" in text
    assert "--blocks_to_swap 20 instead of 10" in text
    assert "expandable_segments" in text and "--gradient_checkpointing_cpu_offload" in text
    assert "--fp8_base" not in text


def test_only_settings_that_are_not_used_yet_are_advised() -> None:
    full = MemoryFigures(allocated=23.5, reserved=23.6, peak=23.6, total=24.0)
    text = explain_out_of_memory(full, settings(offload=True, blocks_to_swap=40), bucket="768x416x21")
    assert [line.strip() for line in text.splitlines()[1:]] == [
        "- fewer target_frames, a smaller resolution or a smaller batch_size for this dataset"
    ]
    text = explain_out_of_memory(full, settings(gradient_checkpointing=False, fp8=False), bucket="768x416x21")
    assert text.index("- --gradient_checkpointing\n") < text.index("--fp8_base --fp8_scaled")


def test_what_the_run_holds_back_itself_is_named_first() -> None:
    held = settings(num_kept=12, limited=True, retried=False, transposed=True)
    text = explain_out_of_memory(FIGURES, held, bucket="768x416x21")
    assert "12 blocks not recomputed" in text
    cures = [line.strip() for line in text.splitlines()[1:]]
    assert any(line.startswith("- --activation_memory off") for line in cures)
    assert any("--vram_limit" in line for line in cures) and any("--on_oom retry" in line for line in cures)
    assert any(line.startswith("- --fp8_fast_transposed off") for line in cures)
    text = explain_out_of_memory(FIGURES, settings(attention_kept=12), bucket="768x416x21")
    assert "--activation_memory off" in text
    text = explain_out_of_memory(FIGURES, settings(), bucket="768x416x21")
    assert not any(name in text for name in ("--activation_memory", "--vram_limit", "--on_oom", "--fp8_fast_t"))


def test_out_of_memory_is_told_from_other_errors() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_a_device_without_an_allocator_has_figures_of_zero() -> None:
    cpu = torch.device("cpu")
    assert memory_figures(cpu).total == 0


def test_memory_for_a_device_that_shares_it_is_not_locked() -> None:
    buffer = pinned_buffer(100, device=torch.device("cpu"))
    assert buffer.numel() == 100 and not is_page_locked(buffer)
    unpin(buffer)
    buffer.fill_(1)
    assert buffer.sum() == 100
