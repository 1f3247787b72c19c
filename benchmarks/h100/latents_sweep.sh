#!/usr/bin/env bash
# What latents.sh trained, measured (docs/continuous.md).
# CLASSIFIER=DIR, that images.sh made, also tells classes.
#   benchmarks/h100/latents_sweep.sh OUT CIFAR10.npz
source "$(dirname "$0")/common.sh"
DATA=${2:?CIFAR-10 as an .npz of its JPEG files}
taught=(--drafters "taught=$OUT/mar_taught/model")
both=(--drafters "taught=$OUT/mar_taught/model,small=$OUT/mar_small/model")
masked=$OUT/mar_masked/model

points() {  # name, target, options
  local name=$1 target=$2
  shift 2
  sweep "latents_$name" 1600 sample.latents_sweep "$target" \
    --tokenizer "$OUT/vae/autoencoder" --ahead 0 --guidance 1 \
    --samples "${SAMPLES:-10000}" --few "${FEW:-500}" \
    --batch_size "${BATCH:-500}" --batches "${BATCHES:-1,8,128,256}" \
    --repeats "${REPEATS:-2}" "$@"
}
quality() { points "$@" --parts quality; }
times() { points "$@" --parts speed; }
# How many drafts are kept: few images say.
kept() { quality "$@" --judged '' --batch_size 250 --only taught\|small; }
(times speed mar "${taught[@]}" --rules path_exact \
    --num_draft "${DRAFTS:-4,8,16,32}"
  times speed_cspd mar "${taught[@]}" --rules cspd --num_draft 4,8
  [ -d "$masked" ] && times speed_masked mar_masked --drafters '' \
    --iterations 64,32,16
  times ahead mar --drafters '' --ahead 0,4,8
  stage head 600 python -m benchmarks.head --target "$OUT/mar/model" \
    --turns "${TURNS:-$OUT/turns}" --out "$OUT/head.json") &
(quality free mar "${taught[@]}" --num_draft 4 --rules 'path_exact;cspd'
  quality steps mar --drafters '' --ahead 0,4 --only 'plain,' \
    --steps 'last_noise=False;first=None;variance=lower') &
(quality guided mar "${taught[@]}" --num_draft 4 --guidance 4 \
    --rules 'path_exact;cspd' --batch_size "$((${BATCH:-500} / 2))"
  [ -d "$masked" ] && quality masked mar_masked --drafters '' \
    --iterations 64,32,16) &
(kept drafters mar "${both[@]}" --num_draft 4 \
    --rules 'path_exact;cspd;cspd, not aligned' --samples "${FEW:-500}"
  kept windows mar "${taught[@]}" --num_draft 8,16,32 \
    --rules 'path_exact;cspd' --samples "${FEW:-500}"
  kept prefill mar "${taught[@]}" --num_draft 4 --samples "${FEW:-500}" \
    --rules 'path_exact;path_exact, last 10;cspd' --prefill 0,0.05,0.15
  kept guided_drafters mar "${both[@]}" --num_draft 4 --guidance 4 \
    --rules 'path_exact;cspd;cspd, not aligned' --samples "${FEW:-500}") &
wait
stage latents_table 60 python -m sample.latents_table --out "$OUT/latents" \
  --results "$OUT"/latents_{drafters,windows,prefill,guided_drafters,free,guided,steps,speed,ahead,speed_cspd}
