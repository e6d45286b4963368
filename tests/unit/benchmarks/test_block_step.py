"""The benchmark of one block, in small, and how kernels are told apart."""

import json
from pathlib import Path

import pytest

from benchmarks.block_step import _kernel_kind, main


@pytest.mark.parametrize("flags", [[], ["--fp8_fast"], ["--fp8_fast", "--transposed"]])
def test_every_bucket_is_measured_kept_and_recomputed(tmp_path: Path, flags: list[str]) -> None:
    common = ["--geometry", "tiny", "--eager", "--repeats", "1", "--results", str(tmp_path), "--name", "x"]
    assert main([*common, *flags]) == 0
    found = json.loads((tmp_path / "block-step-tiny-x.json").read_text(encoding="utf-8"))
    assert (found["compiled"], found["weights"], found["rank"]) == (False, "fp8", 32)
    assert found["fp8_maths"] == bool(flags)
    assert [block["tokens"] for block in found["blocks"]] == [36, 24, 48, 24]
    for block in found["blocks"]:
        assert min(block["kept_ms"], block["recomputed_ms"], block["host_ms"]) > 0
        assert block["saved_bytes"] > block["tokens"] * 128 * 4


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("triton_poi_fused__to_copy_mul_unflatten_3", "dequantise"),
        ("triton_red_fused__to_copy_add_mul_rms_norm_4", "pointwise"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128", "attention"),
        ("triton_red_fused__scaled_dot_product_cudnn_attention__to_copy_mul_2", "pointwise"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT", "matmul"),
        ("Memcpy DtoD (Device -> Device)", "copy"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>", "pointwise"),
        ("something_new", "other"),
    ],
)
def test_kernels_are_told_apart_by_their_names(name: str, kind: str) -> None:
    assert _kernel_kind(name) == kind
