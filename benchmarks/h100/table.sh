#!/usr/bin/env bash
# The drafters that kinds.sh kept, on the same questions at temperatures 0 and
# 1 (docs/results/h200_kinds.json).
#   benchmarks/h100/table.sh OUT QUESTIONS.jsonl
source "$(dirname "$0")/common.sh"
QUESTIONS=${2:?questions, rows of "turns"}

stage kinds_table "${TABLE_S:-600}" python -m benchmarks.drafters \
  --drafters benchmarks/kinds.json --dir "$OUT/kinds/drafters" \
  --questions "$QUESTIONS" --num_questions "${NUM:-40}" \
  --temperatures 0,1 --out "$OUT/h200_kinds.json"
