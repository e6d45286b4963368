"""The ways to run the trainer, and the peer, that training_step.py knows by name."""

from benchmarks.runs import Setting

_FP8 = ("--fp8_base", "--fp8_scaled")
_KEEP = "--activation_memory auto --cuda_graphs off"
_ALL = "--activation_memory off --cuda_graphs off"
_AWAY = "--gradient_checkpointing_cpu_offload"
_AUTO = f"{_KEEP} --blocks_to_swap auto"
_NARROW = "--residual_dtype bfloat16"
_QUEUED = "--compile_cpp_wrapper"
_GRAPHS = "--activation_memory auto --cuda_graphs auto"
SETTINGS: dict[str, Setting] = {
    setting.name: setting
    for setting in (
        Setting(name="reference-eager", extra=f"{_ALL} --blocks_to_swap 10 --no_compile"),
        Setting(name="as-typed", extra="--blocks_to_swap 10"),
        Setting(name="reference", extra=f"{_ALL} --blocks_to_swap 10"),
        Setting(name="no-swap", extra=_ALL),
        Setting(name="no-swap-eager", extra=f"{_ALL} --no_compile"),
        Setting(name="swap-36", extra=f"{_ALL} --blocks_to_swap 36"),
        Setting(name="swap-36-eager", extra=f"{_ALL} --blocks_to_swap 36 --no_compile"),
        Setting(name="bf16-no-swap", extra=_ALL, without=_FP8),
        Setting(name="fp8-fast", extra=f"{_ALL} --fp8_fast"),
        Setting(name="fp8-fast-swap-10", extra=f"{_ALL} --fp8_fast --blocks_to_swap 10"),
        Setting(name="fp8-fast-swap-36", extra=f"{_ALL} --fp8_fast --blocks_to_swap 36"),
        Setting(name="keep", extra=_KEEP),
        Setting(name="keep-cap-24", extra=f"{_KEEP} --vram_limit 24"),
        Setting(name="keep-bf16", extra=_KEEP, without=_FP8),
        Setting(name="keep-fp8-fast", extra=f"{_KEEP} --fp8_fast"),
        Setting(name="keep-fp8-fast-cap-24", extra=f"{_KEEP} --fp8_fast --vram_limit 24"),
        Setting(name="keep-cap-24-offload", extra=f"{_KEEP} --vram_limit 24 {_AWAY}"),
        Setting(name="keep-fp8-fast-cap-24-offload", extra=f"{_KEEP} --fp8_fast --vram_limit 24 {_AWAY}"),
        Setting(name="graphs", extra=_GRAPHS),
        Setting(name="graphs-cap-24", extra=f"{_GRAPHS} --vram_limit 24"),
        Setting(name="graphs-fp8-fast", extra=f"{_GRAPHS} --fp8_fast"),
        Setting(name="graphs-fp8-fast-cap-24", extra=f"{_GRAPHS} --fp8_fast --vram_limit 24"),
        Setting(name="auto-cap-24", extra=f"{_AUTO} --vram_limit 24"),
        Setting(name="auto-fp8-fast-cap-24", extra=f"{_AUTO} --fp8_fast --vram_limit 24"),
        Setting(name="auto-cap-24-offload", extra=f"{_AUTO} --vram_limit 24 {_AWAY}"),
        Setting(name="auto-fp8-fast-cap-24-offload", extra=f"{_AUTO} --fp8_fast --vram_limit 24 {_AWAY}"),
        Setting(name="keep-cap-24-swap-20", extra=f"{_KEEP} --vram_limit 24 --blocks_to_swap 20"),
        Setting(name="keep-fp8-fast-cap-24-swap-20", extra=f"{_KEEP} --fp8_fast --vram_limit 24 --blocks_to_swap 20"),
        Setting(name="reference-bf16-residual", extra=f"{_ALL} --blocks_to_swap 10 {_NARROW}"),
        Setting(name="no-swap-bf16-residual", extra=f"{_ALL} {_NARROW}"),
        Setting(name="swap-36-bf16-residual", extra=f"{_ALL} --blocks_to_swap 36 {_NARROW}"),
        Setting(name="keep-bf16-residual", extra=f"{_KEEP} {_NARROW}"),
        Setting(name="keep-fp8-fast-bf16-residual", extra=f"{_KEEP} --fp8_fast {_NARROW}"),
        Setting(name="graphs-fp8-fast-bf16-residual", extra=f"{_GRAPHS} --fp8_fast {_NARROW}"),
        Setting(name="tuned-fp8-fast-bf16-residual", extra=f"{_GRAPHS} --fp8_fast {_NARROW} --compile_mode tuned"),
        Setting(name="auto-cap-24-bf16-residual", extra=f"{_AUTO} --vram_limit 24 {_NARROW}"),
        Setting(name="auto-fp8-fast-cap-24-bf16-residual", extra=f"{_AUTO} --fp8_fast --vram_limit 24 {_NARROW}"),
        Setting(
            name="queued-fp8-fast-cap-24-bf16-residual", extra=f"{_AUTO} --fp8_fast --vram_limit 24 {_NARROW} {_QUEUED}"
        ),
        Setting(
            name="queued-tuned-fp8-fast-cap-24-bf16-residual",
            extra=f"{_AUTO} --fp8_fast --vram_limit 24 {_NARROW} {_QUEUED} --compile_mode tuned",
        ),
        Setting(name="peer-compile", peer="compile"),
        Setting(name="peer-eager", peer="eager"),
    )
}
"""What `--configs` names."""
PAIRS = (
    ("reference", "no-swap"),
    ("reference-eager", "no-swap-eager"),
    ("swap-36", "no-swap"),
    ("swap-36-eager", "no-swap-eager"),
    ("reference-bf16-residual", "no-swap-bf16-residual"),
    ("swap-36-bf16-residual", "no-swap-bf16-residual"),
)
"""Settings that differ in swapping alone."""
