#!/usr/bin/env bash
# Discrete image tokens on CIFAR-10: tokenizer, decoders, drafters, samples,
# and the sweep of docs/images.md.
#   benchmarks/h100/images.sh OUT CIFAR10.npz
source "$(dirname "$0")/common.sh"
DATA=${2:?CIFAR-10 as an .npz of its JPEG files}

stage vq 900 python -m train.vq --config configs/vq_cifar10.py \
  --config.data.path="$DATA" --config.minutes="${VQ_MIN:-5}" --out "$OUT/vq"
tokenizer=$OUT/vq/tokenizer
decoder() {  # name, config, minutes
  stage "$1" 1500 python -m train.image_ar \
    --config "configs/image_ar_cifar10.py$2" --config.data.path="$DATA" \
    --config.tokenizer="$tokenizer" --config.minutes="$3" --out "$OUT/$1"
}
decoder image_ar '' "${AR_MIN:-8}"
decoder image_ar_small :small "${SMALL_MIN:-3}"
stage samples 300 python -m specjax.sample --config configs/sample_image.py \
  --config.target="$OUT/image_ar/model" --out "$OUT/samples" \
  --config.images.tokenizer="$tokenizer" --config.images.per_class=8 \
  --config.batch_size=80 --config.compare_plain=False
stage codes 300 python -m train.image_rollout \
  --config configs/rollout_image.py --config.target="$OUT/image_ar/model" \
  --config.num_images="${CODES:-10000}" --out "$OUT/codes"
stage eagle 600 python -m train.drafter --config configs/drafter_image.py \
  --config.target="$OUT/image_ar/model" --config.data.rollouts="$OUT/codes" \
  --config.minutes="${EAGLE_MIN:-2}" --out "$OUT/eagle"
stage sweep "${SWEEP_S:-900}" python -m sample.lantern_sweep \
  --target "$OUT/image_ar/model" --tokenizer "$tokenizer" \
  --drafter "$OUT/eagle/drafter" --data "$DATA" \
  --samples "${SAMPLES:-10000}" --out "$OUT/sweep"
