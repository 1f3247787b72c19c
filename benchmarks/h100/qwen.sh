#!/usr/bin/env bash
# Qwen2.5-Coder-1.5B: its drafter from nothing, then HumanEval beside Hugging
# Face assisted generation with the 0.5B model (docs/results/h200_qwen.json).
#   benchmarks/h100/qwen.sh OUT QUESTIONS.jsonl   (of benchmarks.humaneval)
source "$(dirname "$0")/common.sh"
QUESTIONS=${2:?questions, rows of "turns"}

stage qwen_text "${TEXT_S:-300}" python -m train.rollout \
  --config configs/rollout_qwen.py --out "$OUT/text_qwen" \
  --config.num_self_prompts="${PROMPTS:-18432}" --config.form=npz
train() {
  stage "qwen_drafter_$1" "${TRAIN_S:-600}" python -m train.drafter \
    --config configs/drafter_qwen.py --out "$OUT/dspark_qwen" \
    --config.data.rollouts="$OUT/text_qwen" \
    --config.data.exclude="$QUESTIONS" --config.batch_size="$1" \
    --config.minutes="${MINUTES:-4}" --config.eval_every=500 \
    --config.save_every=1000 --config.eval.num_prompts=32
}
if ! train 8; then
  rm -rf "$OUT/dspark_qwen"
  train 4
fi
stage qwen_bench "${BENCH_S:-600}" python -m benchmarks.qwen \
  --drafter "$OUT/dspark_qwen/drafter" --questions "$QUESTIONS" \
  --num_questions "${NUM:-48}" --hf_questions "${HF_NUM:-12}" \
  --out "$OUT/h200_qwen.json"
