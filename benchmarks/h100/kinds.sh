#!/usr/bin/env bash
# Every kind of drafter of SmolLM2-135M, trained equally long, and the other
# ablations (sample.ablate_variants). All kinds in one table: table.sh.
#   benchmarks/h100/kinds.sh OUT
source "$(dirname "$0")/common.sh"

stage smol_text "${TEXT_S:-240}" python -m train.rollout \
  --config configs/rollout_smollm2.py --out "$OUT/text" --config.form=npz \
  --config.num_self_prompts="${PROMPTS:-65536}"
ablate() {  # name, seconds each, limit, axes
  stage "ablate_$1" "$3" python -m sample.ablate_drafter \
    --rollouts "$OUT/text" --out "$OUT/$1" --seconds "$2" --only "$4" \
    --workers "${WORKERS:-8}" ${5:-}
}
ablate kinds "${KIND_EACH:-45}" "${KIND_S:-900}" kind --save
ablate ablations "${AXIS_EACH:-25}" "${AXIS_S:-1500}" \
  "${AXES:-loss,share,layers,ttt,vocabulary,slots,markov}"
