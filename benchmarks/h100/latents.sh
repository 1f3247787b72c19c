#!/usr/bin/env bash
# Continuous image tokens on CIFAR-10: autoencoder, decoder, two drafters of
# equal size (one trained on images, one taught the target's steps), samples.
#   benchmarks/h100/latents.sh OUT CIFAR10.npz
source "$(dirname "$0")/common.sh"
DATA=${2:?CIFAR-10 as an .npz of its JPEG files}

stage vae 900 python -m train.vae --config configs/vae_cifar10.py \
  --config.data.path="$DATA" --config.minutes="${VAE_MIN:-4}" \
  --out "$OUT/vae"
decoder() {  # name, variant, minutes, more
  local name=$1 variant=$2 minutes=$3
  shift 3
  stage "$name" 1500 python -m train.mar \
    --config "configs/mar_cifar10.py$variant" --config.data.path="$DATA" \
    --config.tokenizer="$OUT/vae/autoencoder" --config.minutes="$minutes" \
    --out "$OUT/$name" "$@"
}
decoder mar '' "${MAR_MIN:-8}"
decoder mar_small :small "${SMALL_MIN:-3}"
decoder mar_taught :small "${TAUGHT_MIN:-3}" \
  --config.teacher="$OUT/mar/model"
stage head 300 python -m benchmarks.head --target "$OUT/mar/model" \
  --out "$OUT/h100_head.json"
stage sweep "${SWEEP_S:-600}" python -m sample.latents_sweep \
  --target "$OUT/mar/model" --tokenizer "$OUT/vae/autoencoder" --data "$DATA" \
  --drafters "small=$OUT/mar_small/model,taught=$OUT/mar_taught/model" \
  --samples "${SAMPLES:-10000}" --num_draft 4,8,16 --prefill 0,0.05 \
  --batches 1,8,128 --repeats 2 --out "$OUT/sweep"
for drafter in mar_small mar_taught; do
  for verify in path_exact cspd; do
    stage "sample_${drafter}_$verify" 300 python -m specjax.sample \
      --config configs/sample_latents.py --config.target="$OUT/mar/model" \
      --config.images.tokenizer="$OUT/vae/autoencoder" \
      --config.speculative.model="$OUT/$drafter/model" \
      --config.verify="$verify" --config.images.per_class=8 \
      --config.batch_size=80 --out "$OUT/sample_${drafter}_$verify"
  done
done
