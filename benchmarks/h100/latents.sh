#!/usr/bin/env bash
# Continuous image tokens on CIFAR-10: autoencoder, causal decoder, drafters of
# equal size (one trained on images, which is then taught the target's steps), a
# tiny one for the smaller decoder, MAR's bidirectional decoder, grids of samples.
# TINY=1 tries the commands.
#   benchmarks/h100/latents.sh OUT CIFAR10.npz
source "$(dirname "$0")/common.sh"
DATA=${2:?CIFAR-10 as an .npz of its JPEG files}
T=${TINY:+:tiny}
data=(--config.data.path="$DATA")
[ -n "$T" ] && data=(--config.data.path=synthetic)

stage vae 900 python -m train.vae --config "configs/vae_cifar10.py$T" \
  "${data[@]}" --config.minutes="${VAE_MIN:-2.5}" --out "$OUT/vae"
decoder() {  # name, variant, minutes, more
  local name=$1 variant=$2 minutes=$3
  shift 3
  stage "$name" 1500 python -m train.mar \
    --config "configs/mar_cifar10.py${T:-$variant}" "${data[@]}" \
    --config.tokenizer="$OUT/vae/autoencoder" --config.minutes="$minutes" \
    --out "$OUT/$name" "$@"
}
decoder mar_small :small "${SMALL_MIN:-3}" &
decoder mar '' "${MAR_MIN:-7}"
wait
decoder mar_taught :small "${TAUGHT_MIN:-3.5}" \
  --config.teacher="$OUT/mar/model" \
  --config.init_from="$OUT/mar_small/model" &
decoder mar_nano :nano "${NANO_MIN:-2}" \
  --config.teacher="$OUT/mar_small/model" &
decoder mar_masked :masked "${MASKED_MIN:-3.5}"
wait
for drafter in mar_small mar_taught; do
  stage "sample_$drafter" 300 python -m specjax.sample \
    --config configs/sample_latents.py --config.target="$OUT/mar/model" \
    --config.images.tokenizer="$OUT/vae/autoencoder" \
    --config.speculative.model="$OUT/$drafter/model" \
    --config.images.per_class="${PER_CLASS:-8}" --config.batch_size=80 \
    --out "$OUT/sample_$drafter" &
done
wait
