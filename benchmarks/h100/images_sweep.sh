#!/usr/bin/env bash
# Quality against speed of what images.sh trained (docs/images.md): quality by
# several programs that share the device, then the speed of each point alone.
#   benchmarks/h100/images_sweep.sh OUT CIFAR10.npz
source "$(dirname "$0")/common.sh"
DATA=${2:?CIFAR-10 as an .npz of its JPEG files}
points=(--neighbours "${NEIGHBOURS:-100}" --delta "${DELTA:-0.01,0.05,0.4}"
  --lam "${LAMBDA:-1.5,2,5}" --tree "${TREE:-branching:3,2,1,1}")

sweep() {  # name, target, drafter, options
  local name=$1 target=$2 drafter=$3
  shift 3
  stage "sweep_$name" "${SWEEP_S:-1500}" python -m sample.lantern_sweep \
    --target "$OUT/$target/model" --tokenizer "$OUT/vq/tokenizer" \
    --drafter "$OUT/$drafter" --data "$DATA" \
    --classifier "$OUT/classifier/classifier" \
    --features "${FEATURES:-lite0}" --samples "${SAMPLES:-10000}" \
    --batch_size "${BATCH:-500}" --batches "${BATCHES:-1,8,64}" \
    --repeats "${REPEATS:-5}" "${points[@]}" "$@" --out "$OUT/sweep_$name"
}
eagle=eagle_image_ar/drafter
quality=(--parts quality)
sweep guided image_ar $eagle "${quality[@]}" --guidance 2 &
sweep plain image_ar $eagle "${quality[@]}" --guidance 1 &
sweep small image_ar_small eagle_image_ar_small/drafter "${quality[@]}" \
  --guidance 2 --only 'plain|exact; chain|LANTERN' &
sweep lm image_ar image_ar_small/model "${quality[@]}" --guidance 2 \
  --only 'exact; chain|LANTERN' &
# Compiles what is timed below.
REPEATS=1 sweep warm image_ar $eagle --parts speed --guidance 2 &
wait
sweep speed image_ar $eagle --parts speed --guidance 2
BATCHES=1 sweep speed_plain image_ar $eagle --parts speed --guidance 1
stage sweep_table 60 python -m sample.lantern_plots --out "$OUT/sweep" \
  --results "$OUT"/sweep_{guided,plain,speed,speed_plain}
