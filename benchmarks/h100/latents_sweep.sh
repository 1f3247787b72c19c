#!/usr/bin/env bash
# What latents.sh trained, measured (docs/continuous.md): quality by several
# programs that share the device, then times.
# CLASSIFIER=DIR, that images.sh made, also tells classes.
#   benchmarks/h100/latents_sweep.sh OUT CIFAR10.npz
source "$(dirname "$0")/common.sh"
DATA=${2:?CIFAR-10 as an .npz of its JPEG files}
drafters=taught=$OUT/mar_taught/model,small=$OUT/mar_small/model

sweep() {  # name, target, options
  local name=$1 target=$2
  shift 2
  stage "latents_$name" "${SWEEP_S:-1500}" python -m sample.latents_sweep \
    --target "$OUT/$target/model" --tokenizer "$OUT/vae/autoencoder" \
    --data "$DATA" --classifier "${CLASSIFIER:-}" \
    --features "${FEATURES:-lite0}" \
    --samples "${SAMPLES:-10000}" --few "${FEW:-2500}" \
    --batch_size "${BATCH:-2500}" --batches "${BATCHES:-1,8,128,256}" \
    --repeats "${REPEATS:-2}" "$@" --out "$OUT/latents_$name"
}
one=(--parts quality --num_draft 8 --ahead 0)
many=(--drafters "taught=$OUT/mar_taught/model" --ahead 0
  --num_draft "${DRAFTS:-4,8,16,32}" --rules "path_exact;cspd")
sweep free mar "${one[@]}" --drafters "$drafters" --guidance 1 &
sweep guided mar "${one[@]}" --drafters "$drafters" --guidance 4 &
sweep prefill mar "${one[@]}" --drafters "taught=$OUT/mar_taught/model" \
  --rules path_exact --prefill 0,0.15 --judged '' --guidance 1 --only taught &
# The ablations of the first and the last step, and of the deviations.
sweep steps mar --parts quality --drafters '' --ahead 0,4 --guidance 1 \
  --only 'plain,' \
  --steps 'last_noise=False;first=None;variance=lower' &
[ -d "$OUT/mar_masked/model" ] && sweep masked mar_masked --parts quality \
  --guidance 1 --ahead 0 --iterations 64,32,16 &
REPEATS=1 sweep warm mar "${many[@]}" --parts speed --guidance 1 &
wait
stage head 300 python -m benchmarks.head --target "$OUT/mar/model" \
  --out "$OUT/head.json"
sweep ahead mar --drafters '' --parts speed --guidance 1 --ahead 0,2,4,8,16
sweep speed mar "${many[@]}" --parts speed --guidance 1
[ -d "$OUT/mar_masked/model" ] && sweep speed_masked mar_masked --parts speed \
  --guidance 1 --ahead 0 --iterations 64,32,16
stage latents_table 60 python -m sample.latents_table --out "$OUT/latents" \
  --results "$OUT"/latents_{free,guided,prefill,steps,ahead,speed}
