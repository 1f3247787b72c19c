#!/usr/bin/env bash
# Quality against speed of what images.sh trained (docs/images.md).
#   benchmarks/h100/images_sweep.sh OUT CIFAR10.npz
source "$(dirname "$0")/common.sh"
DATA=${2:?CIFAR-10 as an .npz of its JPEG files}

sweep() {  # name, drafter, options
  local name=$1 drafter=$2
  shift 2
  stage "sweep_$name" "${SWEEP_S:-1500}" python -m sample.lantern_sweep \
    --target "$OUT/image_ar/model" --tokenizer "$OUT/vq/tokenizer" \
    --drafter "$drafter" --data "$DATA" \
    --classifier "$OUT/classifier/classifier" --samples "${SAMPLES:-10000}" \
    --batches "${BATCHES:-1,8,64}" --repeats "${REPEATS:-5}" \
    --out "$OUT/sweep_$name" "$@"
}
sweep eagle "$OUT/eagle_image_ar/drafter" --guidance "${GUIDANCE:-2,1}" \
  --neighbours "${NEIGHBOURS:-100}" --delta 0.1,0.4 --lam 2
sweep small "$OUT/image_ar_small/model" --guidance 2 \
  --neighbours "${NEIGHBOURS:-100}" --delta 0.4 --lam 2
