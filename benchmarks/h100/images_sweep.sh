#!/usr/bin/env bash
# Quality against speed of what images.sh trained (docs/images.md).
#   benchmarks/h100/images_sweep.sh OUT CIFAR10.npz
source "$(dirname "$0")/common.sh"
DATA=${2:?CIFAR-10 as an .npz of its JPEG files}
CLASSIFIER=$OUT/classifier/classifier
many=${SAMPLES:-10000} some=${SOME:-2500}
# Of points that are measured in other settings too; one near the exact rule.
one=${DELTA:-0.1} near=${NEAR:-0.002}

points() {  # name, target, drafter, options
  local name=$1 target=$2 drafter=$3
  shift 3
  sweep "sweep_$name" 1500 sample.lantern_sweep "$target" \
    --tokenizer "$OUT/vq/tokenizer" --drafter "$OUT/$drafter" \
    --batch_size "${BATCH:-500}" --samples "$many" --repeats "${REPEATS:-3}" \
    --batches "${BATCHES:-1,8,64}" \
    --neighbours "${NEIGHBOURS:-100}" --delta "$one" --lam "${LAMBDA:-2}" \
    --tree "${TREE:-branching:3,2,1,1}" --guidance 2 "$@"
}
quality() { points "$@" --parts quality; }
times() { points "$@" --parts speed; }
eagle=eagle_image_ar/drafter
chains='^plain|^exact; chain|^LANTERN; '
few="$chains|LANTERN[+]"
all="$few|^exact; |coupled|GSD"
(times speed image_ar $eagle --delta "$one,$near" \
  --only "$all"
  XLA_FLAGS='' times speed_tuned image_ar $eagle --only "$chains") &
(times speed_greedy image_ar $eagle --temperatures 0 --only "$few"
  times speed_plain image_ar $eagle --guidance 1 --only "$few"
  quality plain image_ar $eagle --guidance 1) &
(quality guided image_ar $eagle --delta "$one,$near,0.0005,0.02,0.4" \
  --lam "${LAMBDAS:-2,1.5,5}" --only '^(?!SJD, LANTERN; .*delta=0.(02|4|0005))'
  quality codes image_ar $eagle --neighbours "${KS:-10,1000}" \
    --only '^LANTERN; ') &
(quality cool image_ar $eagle --temperatures 0.9 --only '^plain|^LANTERN; '
  quality small image_ar_small eagle_image_ar_small/drafter --delta 0.05 \
    --neighbours "${SMALL_K:-10}" --only "$chains"
  # How many drafts are kept, where no distance is taken.
  quality greedy image_ar $eagle --features none --temperatures 0 --only "$few"
  quality lm image_ar image_ar_small/model --features none --samples "$some" \
    --only "$chains") &
wait
stage sweep_table 60 python -m sample.lantern_plots --out "$OUT/sweep" \
  --results "$OUT"/sweep_{guided,plain,codes,cool,greedy,speed,speed_greedy,speed_plain}
