#!/usr/bin/env bash
# What latents.sh trained, measured (docs/continuous.md).
# CLASSIFIER=DIR, that images.sh made, also tells classes.
#   benchmarks/h100/latents_sweep.sh OUT CIFAR10.npz
source "$(dirname "$0")/common.sh"
DATA=${2:?CIFAR-10 as an .npz of its JPEG files}
drafters=taught=$OUT/mar_taught/model,small=$OUT/mar_small/model
taught=(--drafters "taught=$OUT/mar_taught/model")
masked=$OUT/mar_masked/model

points() {  # name, target, options
  local name=$1 target=$2
  shift 2
  sweep "latents_$name" 1500 sample.latents_sweep "$target" \
    --tokenizer "$OUT/vae/autoencoder" --ahead 0 --guidance 1 \
    --samples "${SAMPLES:-10000}" --few "${FEW:-2500}" \
    --batch_size "${BATCH:-2500}" --batches "${BATCHES:-1,8,128,256}" \
    --repeats "${REPEATS:-2}" "$@"
}
quality() { points "$@" --parts quality; }
times() { points "$@" --parts speed; }
(times speed mar "${taught[@]}" --rules path_exact \
    --num_draft "${DRAFTS:-8,4,16,32}"
  times speed_cspd mar "${taught[@]}" --rules cspd --num_draft 8) &
(times ahead mar --drafters '' --ahead 0,4,8
  [ -d "$masked" ] && times speed_masked mar_masked --drafters '' \
    --iterations 64,32,16) &
(quality free mar --drafters "$drafters" --num_draft 8 \
    --rules 'path_exact;cspd;path_exact, last 10;cspd, not aligned'
  quality windows mar "${taught[@]}" --num_draft 4,16,32 --judged '' \
    --rules 'path_exact;cspd' --only taught) &
(quality guided mar "${taught[@]}" --num_draft 8 --guidance 4 \
    --rules 'path_exact;cspd'
  quality prefill mar "${taught[@]}" --num_draft 8 --rules path_exact \
    --prefill 0,0.15 --judged '' --only taught) &
# The ablations of the first and the last step, and of the deviations.
(quality steps mar --drafters '' --ahead 0,4 --only 'plain,' \
    --steps 'last_noise=False;first=None;variance=lower'
  [ -d "$masked" ] && quality masked mar_masked --drafters '' \
    --iterations 64,32,16) &
wait
stage head 300 python -m benchmarks.head --target "$OUT/mar/model" \
  --out "$OUT/head.json"
stage latents_table 60 python -m sample.latents_table --out "$OUT/latents" \
  --results "$OUT"/latents_{free,guided,windows,prefill,steps,speed,ahead,speed_cspd}
