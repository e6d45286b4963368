#!/usr/bin/env bash
# bash configs/cache_overnight.sh style.toml motion.toml
#
# Caches several datasets in a row, pictures and clips first, captions second. The files are checked together before
# anything is encoded, so start it and look at the first lines. A dataset whose media are at fault is left out and named
# again at the end; the others are cached. Run it again after mending: only what is missing or has changed is encoded.
# Paths are relative to the folder that you call it from; VAE and T5 in the environment name the model files.
# Exit code: 0 if everything is cached, otherwise that of the script that failed.
set -u

vae="${VAE:-models/wan_2.1_vae.safetensors}"
t5="${T5:-models/models_t5_umt5-xxl-enc-bf16.pth}"
scripts="$(dirname "$0")/.."

[ "$#" -gt 0 ] || { echo "name the dataset files: bash configs/cache_overnight.sh style.toml motion.toml" >&2; exit 2; }

python "$scripts"/wan_cache_latents.py --dataset_config "$@" --vae "$vae"
latents=$?
[ "$latents" -ne 130 ] || exit 130 # Ctrl-C

python "$scripts"/wan_cache_text_encoder_outputs.py --dataset_config "$@" --t5 "$t5" --batch_size 16
text=$?

echo "latents: exit code $latents, captions: exit code $text"
[ "$latents" -eq 0 ] || exit "$latents"
exit "$text"
