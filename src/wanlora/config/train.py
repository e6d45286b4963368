"""What a training run is asked to do: one dataclass per group of flags.

The name of a field is its flag and its key in `--config_file`; the names are musubi's wherever musubi has the thing.
Which flags make sense together is checked in `checks.py`; here stands what each may hold on its own.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from wanlora.config.fields import Checked, check_fields
from wanlora.config.kinds import (
    Count,
    CountOrZero,
    DtypeName,
    ExistingPath,
    NotNegative,
    OptimizerName,
    Portion,
    Positive,
    Share,
    Steps,
    Timestep,
)
from wanlora.config.outputs import LoggingConfig, MetadataConfig, PreviewConfig, SavingConfig, ValidationConfig
from wanlora.config.values import NetworkArgs, parse_key_values, parse_network_args
from wanlora.foundation.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig(Checked):
    """Model files."""

    task: str = "t2v-14B"
    """Which Wan model is trained."""
    dit: ExistingPath | None = None
    """The diffusion transformer: a .safetensors file, any file of a sharded set, or the folder that holds it."""
    vae: ExistingPath | None = None
    """Wan VAE; only previews need it."""
    vae_dtype: DtypeName | None = None
    """Maths of the VAE when previews are decoded. Default: float32."""
    vae_cache_cpu: bool = False
    """Keep the VAE's frame cache in system memory while previews are decoded."""
    vae_tiling: Literal["auto", "on", "off"] = "auto"
    """Decode previews in tiles, with the same pixels: auto where they do not fit whole into the GPU's memory."""
    t5: ExistingPath | None = None
    """UMT5-XXL encoder; only previews need it."""
    fp8_t5: bool = False
    """Keep the text encoder's weights in fp8: half the memory."""
    tokenizer: ExistingPath | None = None
    """tokenizer.json, spiece.model or a folder that holds one. Default: beside --t5, inside it, then Hugging Face."""
    offline: bool = False
    """Never download; a missing tokenizer is an error."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionConfig(Checked):
    """Attention kernels."""

    sdpa: bool = False
    """PyTorch's scaled_dot_product_attention; what is used if no kernel is named."""
    flash_attn: bool = False
    """FlashAttention 2 (package flash-attn)."""
    flash3: bool = False
    """FlashAttention 3 (package flash_attn_interface)."""
    xformers: bool = False
    """xformers' memory-efficient attention."""
    sage_attn: bool = False
    """SageAttention for previews only: it has no backward, training uses one of the others."""
    split_attn: bool = False
    """One sample at a time through attention; not needed here, accepted without effect."""

    @property
    def training_kernel(self) -> str:
        """The first named of sdpa, flash, xformers, flash3 (musubi's precedence); sdpa if none is."""
        named = {"sdpa": self.sdpa, "flash": self.flash_attn, "xformers": self.xformers, "flash3": self.flash3}
        return next((kernel for kernel, wanted in named.items() if wanted), "sdpa")

    @property
    def preview_kernel(self) -> str:
        """sage with --sage_attn, otherwise what training uses."""
        return "sage" if self.sage_attn else self.training_kernel


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig(Checked):
    """Data and the run."""

    dataset_config: ExistingPath | None = None
    """Dataset TOML."""
    max_train_steps: Count = 1600
    """Optimizer steps."""
    max_train_epochs: Count | None = None
    """Epochs; overrides --max_train_steps."""
    max_data_loader_n_workers: CountOrZero = 8
    """Processes that read batches; never more than there are processors."""
    persistent_data_loader_workers: bool = False
    """Keep those processes from one epoch to the next."""
    seed: CountOrZero | None = None
    """Seed of data order, noise, timesteps, dropout and initial weights. Default: drawn and printed."""
    gradient_accumulation_steps: Count = 1
    """Batches per optimizer step."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Number format of the maths. Default: what accelerate launch was told, otherwise that of the file --dit."""
    device: str | None = None
    """Where to train: cuda, cuda:1 or cpu. Default: what accelerate chooses."""
    show_timesteps: Literal["image", "console"] | None = None
    """Show how often each timestep would be drawn, and end."""
    dry_run: bool = False
    """Check everything, say what would be done, train nothing."""
    debug: bool = False
    """Show tracebacks and more log lines."""
    ddp_timeout: Count | None = None
    """Minutes that the processes of a run on several GPUs wait for each other."""
    ddp_gradient_as_bucket_view: bool = False
    """An option of DDP, which is not used: accepted without effect."""
    ddp_static_graph: bool = False
    """An option of DDP, which is not used: accepted without effect."""
    cuda_allow_tf32: bool = False
    """Allow TF32 in float32 matmuls and convolutions."""
    cuda_cudnn_benchmark: bool = False
    """Let cuDNN measure which convolution is fastest."""
    deterministic: bool = False
    """Let the GPU compute in a fixed order, so that runs repeat bit for bit; slower."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig(Checked):
    """Optimizer."""

    optimizer_type: OptimizerName = "adamw"
    """Known names in any case, a class of torch.optim, or the dotted path of any optimizer class."""
    optimizer_args: tuple[str, ...] = ()
    """key=value pairs handed to the optimizer, for example weight_decay=0.1 betas=0.9,0.99."""
    learning_rate: NotNegative = 2e-6
    """Learning rate; 1e-4 is usual for LoRAs."""
    max_grad_norm: NotNegative = 1.0
    """Gradients are scaled down to this norm; 0 leaves them as they are."""

    @property
    def kwargs(self) -> dict[str, Any]:
        """`optimizer_args` as values. Raises `ConfigError`."""
        return parse_key_values(self.optimizer_args, "--optimizer_args")


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig(Checked):
    """Learning rate schedule."""

    lr_scheduler: str = "constant"
    """Shape of the learning rate over the run."""
    lr_warmup_steps: Steps = 0
    """Steps in which the learning rate rises from 0; a share of all steps below 1, or 10%."""
    lr_decay_steps: Steps = 0
    """Steps in which the learning rate falls at the end; a share of all steps below 1, or 10%."""
    lr_scheduler_num_cycles: Count = 1
    """Restarts of cosine_with_restarts."""
    lr_scheduler_power: Positive = 1.0
    """Exponent of polynomial."""
    lr_scheduler_timescale: Count | None = None
    """Time scale of inverse_sqrt. Default: the warmup steps."""
    lr_scheduler_min_lr_ratio: Portion | None = None
    """The lowest learning rate, relative to the highest. Default: 0; 0.01 for rex."""
    lr_scheduler_type: str | None = None
    """Dotted path of a scheduler class; it gets the optimizer and --lr_scheduler_args."""
    lr_scheduler_args: tuple[str, ...] = ()
    """key=value pairs handed to the scheduler."""

    @property
    def kwargs(self) -> dict[str, Any]:
        """`lr_scheduler_args` as values. Raises `ConfigError`."""
        return parse_key_values(self.lr_scheduler_args, "--lr_scheduler_args")


@dataclass(frozen=True, kw_only=True, slots=True)
class TimestepConfig(Checked):
    """Noise levels and their weights."""

    timestep_sampling: str = "sigma"
    """How noise levels are drawn."""
    discrete_flow_shift: Positive = 1.0
    """Above 1 draws more high noise (sigma, shift)."""
    sigmoid_scale: Positive = 1.0
    """Width of the bell of the sigmoid and shift samplers."""
    weighting_scheme: str = "none"
    """Weight of the loss by noise level; logit_normal and mode change how sigma draws instead."""
    logit_mean: float = 0.0
    """Mean of logit_normal and of logsnr."""
    logit_std: Positive = 1.0
    """Standard deviation of logit_normal and of logsnr."""
    mode_scale: float = 1.29
    """Strength of mode."""
    min_timestep: Timestep | None = None
    """Lowest timestep that is trained. Default: 0."""
    max_timestep: Timestep | None = None
    """Highest timestep that is trained. Default: 1000."""
    preserve_distribution_shape: bool = False
    """Cut the distribution at the two bounds instead of squeezing it between them."""
    num_timestep_buckets: Count | None = None
    """Spread the noise levels of an epoch evenly over this many buckets; from 2 on."""

    def __post_init__(self) -> None:
        check_fields(self)
        low, high = self.min_timestep or 0, 1000 if self.max_timestep is None else self.max_timestep
        if low >= high:
            raise ConfigError(f"--min_timestep must be below --max_timestep, got {low} and {high}")


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkConfig(Checked):
    """What is trained."""

    network_module: str | None = None
    """networks.lora_wan."""
    network_dim: Count | None = None
    """Rank of the update. Default: 4."""
    network_alpha: NotNegative = 1.0
    """The update is scaled by alpha / rank; 0 means alpha = rank."""
    network_dropout: Share | None = None
    """Probability that an element between the two factors is dropped."""
    network_args: tuple[str, ...] = ()
    """key=value pairs: exclude_patterns, include_patterns, rank_dropout, module_dropout, loraplus_lr_ratio, verbose."""
    network_weights: ExistingPath | None = None
    """Go on from this LoRA file."""
    dim_from_weights: bool = False
    """Take rank and alpha of every module from --network_weights."""
    base_weights: tuple[ExistingPath, ...] = ()
    """LoRA files that are merged into the model before training."""
    base_weights_multiplier: tuple[float, ...] = ()
    """Strength of each of --base_weights. Default: 1."""
    scale_weight_norms: Positive | None = None
    """Largest norm of a module's update; larger ones are scaled down after each step."""

    @property
    def rank(self) -> int:
        """network_dim, or 4."""
        return 4 if self.network_dim is None else self.network_dim

    @property
    def args(self) -> NetworkArgs:
        """`network_args` as values. Raises `ConfigError`."""
        return parse_network_args(self.network_args)

    @property
    def merged_weights(self) -> tuple[tuple[Path, float], ...]:
        """`base_weights`, each with its multiplier."""
        missing = len(self.base_weights) - len(self.base_weights_multiplier)
        return tuple(zip(self.base_weights, (*self.base_weights_multiplier, *[1.0] * missing), strict=False))


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryConfig(Checked):
    """Memory and speed."""

    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""
    gradient_checkpointing_cpu_offload: bool = False
    """Keep what checkpointing saves in system memory."""
    activation_memory: Positive | Literal["auto", "off"] = "auto"
    """How much of the GPU may hold what would be computed again: what is free (auto), so many GiB, or nothing (off)."""
    vram_reserve: NotNegative | None = None
    """GiB of the GPU's memory that are left to others. Default: 0.5; 1 on Windows and WSL."""
    vram_limit: Positive | None = None
    """GiB of the GPU's memory that the run may take at most. Default: all that is free."""
    on_oom: Literal["retry", "stop"] = "retry"
    """When the GPU's memory runs out: make room (recompute and swap more) and repeat the step, or end the run."""
    trial_step: bool | None = None
    """Try the largest batch before the first step. Default: on a GPU."""
    fp8_base: bool = False
    """Keep the model's weights in fp8; with --fp8_scaled in blocks with a scale each, which is far more precise."""
    fp8_scaled: bool = False
    """fp8 weights with a scale per block of 64; implies --fp8_base."""
    quantized_cache: Path | None = None
    """Folder in which the fp8 weights are kept, about half the size of the model: the next start reads those."""
    fp8_fast: bool = False
    """Multiply in fp8 as well, on cards that can; with --fp8_scaled. Its error is measured on the data and printed."""
    fp8_fast_transposed: Literal["auto", "on", "off"] = "auto"
    """Keep a second, transposed copy of the weights for --fp8_fast: faster steps for as much memory again as the
    weights take; auto: where every size fits beside it with nothing recomputed and no block is swapped."""
    blocks_to_swap: CountOrZero | Literal["auto"] | None = None
    """How many transformer blocks' memory is freed: they stay in system memory and are copied when they are due; auto:
    for each size of batch as many as are foretold to make the run shortest, among those with which it fits."""
    use_pinned_memory_for_block_swap: bool = False
    """Pin the memory of those blocks: faster copies; this is always done."""
    block_swap_h2d_only: bool = False
    """Copy blocks to the GPU only, never back; this is always so."""
    block_swap_ring_size: Count = 2
    """GPU buffers for blocks under way; more hide slower copies."""
    residual_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the residual stream; auto is float32, bfloat16 needs less memory and is less exact."""
    compile: bool | None = None
    """Compile the blocks. Default: on CUDA where a compiler exists; --no_compile turns it off."""
    compile_backend: str = "inductor"
    """Backend of torch.compile."""
    compile_mode: str = "default"
    """Mode of torch.compile, or tuned: try more shapes of kernels, a minute at the first start, for faster steps."""
    compile_cpp_wrapper: bool = False
    """Queue the kernels of compiled blocks by C++ instead of Python: less work for the host, a minute or two more to
    compile at the first start. Needs a C++ compiler and, on a GPU, the CUDA toolkit."""
    compile_dynamic: Literal["true", "false", "auto"] | None = None
    """Whether one graph serves all sizes. Default: true for the number of tokens."""
    compile_fullgraph: bool = False
    """Refuse graph breaks."""
    compile_cache_size_limit: Count | None = None
    """How many graphs torch.compile keeps, those of all sizes and of all ways to save counted together. Default: 32."""
    cuda_graphs: Literal["auto", "off"] | None = None
    """auto: passes that the GPU could do faster than the host can queue them are recorded once and replayed whole.
    Default: auto."""

    @property
    def num_swapped(self) -> int:
        """`blocks_to_swap` as a number; `auto` is 0 until it is settled (training/planning.py)."""
        return self.blocks_to_swap if isinstance(self.blocks_to_swap, int) else 0

    @property
    def fp8_mode(self) -> Literal["scaled", "plain"] | None:
        """How the model's weights are kept in fp8, if they are."""
        if self.fp8_scaled:
            return "scaled"
        return "plain" if self.fp8_base else None


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """wan_train_network.py: trains a LoRA on cached latents and text."""

    model: ModelConfig = field(default_factory=ModelConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    run: RunConfig = field(default_factory=RunConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    timesteps: TimestepConfig = field(default_factory=TimestepConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    saving: SavingConfig = field(default_factory=SavingConfig)
    previews: PreviewConfig = field(default_factory=PreviewConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    metadata: MetadataConfig = field(default_factory=MetadataConfig)
