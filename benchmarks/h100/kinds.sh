#!/usr/bin/env bash
# Every kind of drafter of SmolLM2-135M, trained equally long, then all in one
# table at both temperatures; and the other ablations.
#   benchmarks/h100/kinds.sh OUT QUESTIONS.jsonl
source "$(dirname "$0")/common.sh"
QUESTIONS=${2:?questions, rows of "turns"}

stage smol_text "${TEXT_S:-240}" python -m train.rollout \
  --config configs/rollout_smollm2.py --out "$OUT/text" --config.form=npz
ablate() {
  stage "ablate_$1" "$2" python -m sample.ablate_drafter \
    --rollouts "$OUT/text" --out "$OUT/ablations" --seconds "${SECONDS_EACH:-60}" \
    --only "$1" --workers "${WORKERS:-4}" --save
}
ablate kind "${KIND_S:-900}"
stage kinds_table "${TABLE_S:-600}" python -m benchmarks.drafters \
  --drafters benchmarks/kinds.json --dir "$OUT/ablations/drafters" \
  --questions "$QUESTIONS" --num_questions "${NUM:-48}" \
  --temperatures 0,1 --out "$OUT/h100_kinds.json"
for axis in loss slots layers vocabulary ttt share markov; do
  ablate "$axis" "${AXIS_S:-600}"
done
stage ablate_plots 120 python -m sample.ablate_plots \
  --results "$OUT/ablations/ablations.json"
