#!/usr/bin/env bash
# What latents.sh trained, measured (docs/continuous.md).
# CLASSIFIER=DIR, that images.sh made, also tells classes.
#   benchmarks/h100/latents_sweep.sh OUT CIFAR10.npz
source "$(dirname "$0")/common.sh"
DATA=${2:?CIFAR-10 as an .npz of its JPEG files}

stage head 300 python -m benchmarks.head --target "$OUT/mar/model" \
  --out "$OUT/head.json"
stage sweep "${SWEEP_S:-1500}" python -m sample.latents_sweep \
  --target "$OUT/mar/model" --tokenizer "$OUT/vae/autoencoder" --data "$DATA" \
  --drafters "taught=$OUT/mar_taught/model,small=$OUT/mar_small/model" \
  --samples "${SAMPLES:-10000}" --num_draft "${DRAFTS:-4,8,16,32}" \
  --classifier "${CLASSIFIER:-}" --prefill 0.05 --batches "${BATCHES:-1,8,128,256}" --repeats 2 \
  --out "$OUT/sweep"
stage sweep_masked "${MASKED_S:-600}" python -m sample.latents_sweep \
  --target "$OUT/mar_masked/model" --tokenizer "$OUT/vae/autoencoder" \
  --data "$DATA" --classifier "${CLASSIFIER:-}" \
  --samples "${SAMPLES:-10000}" --iterations 64,32,16 \
  --batches "${BATCHES:-1,8,128,256}" --repeats 2 --out "$OUT/sweep_masked"
