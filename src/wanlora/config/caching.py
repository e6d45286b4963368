"""What the two caching scripts are asked to do."""

from dataclasses import dataclass
from typing import Literal

from wanlora.config.fields import Checked
from wanlora.config.kinds import Count, CountOrZero, DtypeName, ExistingPath
from wanlora.foundation.dtype_names import full_dtype_name


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheConfig(Checked):
    """What both caching scripts share."""

    dataset_config: tuple[ExistingPath, ...] = ()
    """Dataset TOML; several are cached one after the other."""
    device: str | None = None
    """Where to encode: cuda, cuda:1 or cpu. Default: cuda where there is one."""
    batch_size: Count | None = None
    """How many items are encoded at once. Default: the dataset's batch_size."""
    num_workers: CountOrZero | None = None
    """How many threads decode media ahead of the VAE. Default: one fewer than the processors, at most 4."""
    skip_existing: bool = False
    """Accepted from musubi; cache files that still fit are always kept."""
    keep_cache: bool = False
    """Accepted from musubi; cache files that the dataset no longer asks for are always kept."""
    dry_run: bool = False
    """Check everything, say what would be done, write nothing."""
    debug: bool = False
    """Show tracebacks and more log lines."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentCacheConfig(CacheConfig):
    """wan_cache_latents.py: pictures and clips become latents."""

    vae: ExistingPath | None = None
    """Wan VAE (.safetensors or .pth)."""
    vae_dtype: DtypeName | None = None
    """Maths and storage of the VAE. Default: float32 maths, latents stored as bfloat16."""
    vae_cache_cpu: bool = False
    """Keep the VAE's frame cache in system memory: slower, less GPU memory."""
    vae_tiling: Literal["auto", "on", "off"] = "auto"
    """Encode frames in tiles, with the same latents: auto where they do not fit whole into the GPU's memory."""
    disable_cudnn_backend: bool = False
    """Run convolutions without cuDNN."""
    debug_mode: Literal["image", "console", "video"] | None = None
    """Show what would be cached instead of encoding it: as pictures or clips in <cache>/debug, or on the console."""
    console_width: Count = 80
    """Characters per line with --debug_mode console."""
    console_num_images: Count | None = None
    """How many items --debug_mode shows. Default: all."""

    @property
    def maths(self) -> str:
        """The format that the VAE computes in: float32 unless the user says otherwise."""
        return full_dtype_name(self.vae_dtype or "float32")

    @property
    def storage(self) -> str:
        """The format that latents are stored in: bfloat16 unless the user says otherwise."""
        return full_dtype_name(self.vae_dtype or "bfloat16")


@dataclass(frozen=True, kw_only=True, slots=True)
class TextCacheConfig(CacheConfig):
    """wan_cache_text_encoder_outputs.py: captions become text embeddings."""

    t5: ExistingPath | None = None
    """UMT5-XXL encoder (.pth or .safetensors)."""
    fp8_t5: bool = False
    """Keep the text encoder's weights in fp8: half the memory."""
    tokenizer: ExistingPath | None = None
    """tokenizer.json, spiece.model or a folder that holds one. Default: beside --t5, inside it, then Hugging Face."""
    offline: bool = False
    """Never download; a missing tokenizer is an error."""
