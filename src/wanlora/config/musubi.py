"""What musubi knows: the names that its users type, and an answer for each that means something else here.

An abbreviated flag is looked up among musubi's names only, because that is what it stood for in the user's script. A
flag or key that wanlora does not need is accepted with one sentence; one whose wish cannot be met is refused with one.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Answer:
    """What is said to a name of musubi's that has no setting here."""

    sentence: str
    refused: bool = True
    is_switch: bool = False
    """The flag takes no value."""


_CACHING = "dataset_config device batch_size num_workers skip_existing keep_cache"

_TRAINING = """
task dit dit_high_noise timestep_boundary offload_inactive_dit force_v2_1_time_embedding vae vae_dtype
vae_cache_cpu t5 fp8_t5 clip one_frame guidance_scale
sdpa flash_attn xformers flash3 sage_attn split_attn
config_file dataset_config max_train_steps max_train_epochs max_data_loader_n_workers
persistent_data_loader_workers seed gradient_accumulation_steps mixed_precision show_timesteps
optimizer_type optimizer_args learning_rate max_grad_norm
lr_scheduler lr_warmup_steps lr_decay_steps lr_scheduler_num_cycles lr_scheduler_power lr_scheduler_timescale
lr_scheduler_min_lr_ratio lr_scheduler_type lr_scheduler_args
timestep_sampling discrete_flow_shift sigmoid_scale weighting_scheme logit_mean logit_std mode_scale
min_timestep max_timestep preserve_distribution_shape num_timestep_buckets
network_module network_dim network_alpha network_dropout network_args network_weights dim_from_weights
base_weights base_weights_multiplier scale_weight_norms training_comment no_metadata
output_dir output_name save_every_n_epochs save_every_n_steps save_last_n_epochs save_last_n_epochs_state
save_last_n_steps save_last_n_steps_state save_state save_state_on_train_end save_precision resume
sample_prompts sample_every_n_steps sample_every_n_epochs sample_at_first
logging_dir log_with log_prefix log_tracker_name wandb_run_name wandb_api_key log_tracker_config log_config
gradient_checkpointing gradient_checkpointing_cpu_offload fp8_base fp8_scaled blocks_to_swap
use_pinned_memory_for_block_swap block_swap_h2d_only block_swap_ring_size disable_numpy_memmap
img_in_txt_in_offloading compile compile_backend compile_mode compile_dynamic compile_fullgraph
compile_cache_size_limit dynamo_backend dynamo_mode dynamo_fullgraph dynamo_dynamic
cuda_allow_tf32 cuda_cudnn_benchmark ddp_timeout ddp_gradient_as_bucket_view ddp_static_graph
metadata_title metadata_author metadata_description metadata_license metadata_tags metadata_reso metadata_arch
huggingface_repo_id huggingface_repo_type huggingface_path_in_repo huggingface_token
huggingface_repo_visibility save_state_to_huggingface resume_from_huggingface async_upload
"""

MUSUBI_FLAGS: dict[str, tuple[str, ...]] = {
    "wan_cache_latents.py": tuple(
        f"""{_CACHING} vae vae_dtype debug_mode console_width console_back console_num_images disable_cudnn_backend
        vae_cache_cpu i2v clip one_frame""".split()
    ),
    "wan_cache_text_encoder_outputs.py": tuple(f"{_CACHING} t5 fp8_t5".split()),
    "wan_train_network.py": tuple(_TRAINING.split()),
}
"""Flags of each script, without the dashes."""

_NO_CLIP = "only image-to-video models have a CLIP encoder; it is not read"
_TWO_EXPERTS = (
    "training two experts at once is not supported; train one: give it as --dit, with --min_timestep and --max_timestep"
)
_ONE_EXPERT = "one model is trained, so there is nothing to decide between two experts"
_ONE_FRAME = "one-frame (image editing) training is not supported; remove the flag"
_UPLOAD = "nothing is uploaded during training; upload the saved files afterwards with: hf upload"
_DYNAMO = "accelerate's dynamo settings are not used; --compile, --compile_backend, --compile_mode, ... set compilation"

ANSWERED_FLAGS: dict[str, Answer] = {
    "i2v": Answer("image-to-video is not supported; remove the flag to cache for text-to-video", is_switch=True),
    "clip": Answer(_NO_CLIP, refused=False),
    "one_frame": Answer(_ONE_FRAME, is_switch=True),
    "console_back": Answer("the background of --debug_mode console is the terminal's", refused=False),
    "dit_high_noise": Answer(_TWO_EXPERTS),
    "timestep_boundary": Answer(_ONE_EXPERT, refused=False),
    "offload_inactive_dit": Answer(_ONE_EXPERT, refused=False, is_switch=True),
    "force_v2_1_time_embedding": Answer(
        "every sample has one timestep, so it is embedded once per sample for all models", refused=False, is_switch=True
    ),
    "guidance_scale": Answer("Wan has no embedded guidance; CFG of previews is --l in the prompt file", refused=False),
    "disable_numpy_memmap": Answer("files are read in large pieces, not mapped", refused=False, is_switch=True),
    "img_in_txt_in_offloading": Answer("Wan's input layers are small and stay put", refused=False, is_switch=True),
    "dynamo_backend": Answer(_DYNAMO, refused=False),
    "dynamo_mode": Answer(_DYNAMO, refused=False),
    "dynamo_fullgraph": Answer(_DYNAMO, refused=False, is_switch=True),
    "dynamo_dynamic": Answer(_DYNAMO, refused=False, is_switch=True),
    "huggingface_repo_id": Answer(_UPLOAD),
    "huggingface_repo_type": Answer(_UPLOAD),
    "huggingface_path_in_repo": Answer(_UPLOAD),
    "huggingface_token": Answer(_UPLOAD),
    "huggingface_repo_visibility": Answer(_UPLOAD),
    "save_state_to_huggingface": Answer(_UPLOAD, is_switch=True),
    "async_upload": Answer(_UPLOAD, is_switch=True),
    "resume_from_huggingface": Answer(
        "states are not downloaded; fetch the folder with: hf download, and give it as --resume", is_switch=True
    ),
}

MEANS_DEFAULT = ("optimizer_type", "")
"""musubi's default of this flag is an empty text; files that spell out all flags hold it."""

_CONTROL = "control inputs are not supported: text-to-video models take none; remove it"
_OTHER_MODEL = "belongs to other models and changes nothing for Wan"

ANSWERED_KEYS: dict[str, Answer] = {
    "control_directory": Answer(_CONTROL),
    "control_resolution": Answer(_CONTROL),
    "qwen_image_edit_control_resolution": Answer(_CONTROL),
    "no_resize_control": Answer(_OTHER_MODEL, refused=False),
    "flux_kontext_no_resize_control": Answer(_OTHER_MODEL, refused=False),
    "qwen_image_edit_no_resize_control": Answer(_OTHER_MODEL, refused=False),
    "multiple_target": Answer(_OTHER_MODEL, refused=False),
    "fp_latent_window_size": Answer(_OTHER_MODEL, refused=False),
    "fp_1f_clean_indices": Answer("one-frame (image editing) training is not supported; remove it"),
    "fp_1f_target_index": Answer("one-frame (image editing) training is not supported; remove it"),
    "fp_1f_no_post": Answer("one-frame (image editing) training is not supported; remove it"),
}
