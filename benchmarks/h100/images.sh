#!/usr/bin/env bash
# Discrete image tokens on CIFAR-10: tokenizer, decoders of 28 M and 8 M
# parameters, a drafter for each, a classifier that judges samples, grids of
# samples. TINY=1 tries the commands.
#   benchmarks/h100/images.sh OUT CIFAR10.npz
source "$(dirname "$0")/common.sh"
DATA=${2:?CIFAR-10 as an .npz of its JPEG files}
T=${TINY:+:tiny}
data=(--config.data.path="$DATA")
[ -n "$T" ] && data=(--config.data.path=synthetic)

stage vq 900 python -m train.vq --config "configs/vq_cifar10.py$T" \
  "${data[@]}" --config.minutes="${VQ_MIN:-2.5}" --out "$OUT/vq"
tokenizer=$OUT/vq/tokenizer
decoder() {  # name, variant, minutes
  stage "$1" 1500 python -m train.image_ar \
    --config "configs/image_ar_cifar10.py${T:-$2}" "${data[@]}" \
    --config.tokenizer="$tokenizer" --config.minutes="$3" --out "$OUT/$1"
}
drafter() {  # decoder, minutes
  local target=$OUT/$1/model count=()
  [ -n "$T" ] && count=(--config.num_images=40 --config.batch_size=8)
  stage "codes_$1" 300 python -m train.image_rollout \
    --config configs/rollout_image.py --config.target="$target" \
    --config.num_images="${CODES:-20000}" "${count[@]}" --out "$OUT/codes_$1"
  [ -n "$T" ] && count=(--config.steps=4 --config.batch_size=4)
  stage "eagle_$1" 600 python -m train.drafter \
    --config configs/drafter_image.py --config.target="$target" \
    --config.data.rollouts="$OUT/codes_$1" --config.minutes="$2" \
    --config.save.form=int8 \
    "${count[@]}" --out "$OUT/eagle_$1"
}
decoder image_ar '' "${AR_MIN:-8}"
drafter image_ar "${EAGLE_MIN:-2}" &
decoder image_ar_small :small "${SMALL_MIN:-4.5}"
drafter image_ar_small "${EAGLE_MIN:-2}"
wait
stage classifier 600 python -m train.classifier \
  --config "configs/classifier_cifar10.py$T" "${data[@]}" \
  --out "$OUT/classifier"
for name in image_ar image_ar_small; do
  stage "samples_$name" 300 python -m specjax.sample \
    --config configs/sample_image.py --config.target="$OUT/$name/model" \
    --out "$OUT/samples_$name" --config.images.tokenizer="$tokenizer" \
    --config.images.per_class="${PER_CLASS:-8}" --config.batch_size=80 \
    --config.compare_plain=False &
done
wait
