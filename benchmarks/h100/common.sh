# Sourced by the scripts beside it. One accelerator each (an H100 or H200), half
# an hour; every program goes on where it stopped, so a script can be started
# again.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
OUT=${1:?folder for everything that is trained and measured}
mkdir -p "$OUT/log"
export PYTHONUNBUFFERED=1
# Some stages share a device: memory as it is needed.
export XLA_PYTHON_CLIENT_PREALLOCATE=false
# Kernels of cuBLAS as it chooses them: to try kernels on a device that others
# use takes minutes and finds noise. XLA_FLAGS= lets XLA try.
export XLA_FLAGS="${XLA_FLAGS---xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false}"

# stage NAME SECONDS COMMAND...: runs once, with a log and a limit. A stage
# that hangs tells where: SIGABRT makes Python print its stacks.
stage() {
  local name=$1 limit=$2 begin=$SECONDS code
  shift 2
  if [ -e "$OUT/log/$name.done" ]; then return 0; fi
  echo "$(date +%T) $name: at most $limit s"
  PYTHONFAULTHANDLER=1 timeout -s ABRT -k 10 "$limit" "$@" \
    >"$OUT/log/$name.log" 2>&1
  code=$?
  echo "$(date +%T) $name: exit $code after $((SECONDS - begin)) s"
  if [ "$code" = 0 ]; then touch "$OUT/log/$name.done"; fi
  return "$code"
}

# sweep NAME SECONDS MODULE TARGET ARGUMENTS...: a stage that measures points
# of a sweep into $OUT/NAME, judged beside the images of $DATA. All of them may
# run at once: who takes times has the device alone.
sweep() {
  local name=$1 limit=$2 module=$3 target=$4
  shift 4
  stage "$name" "$limit" python -m "$module" --target "$OUT/$target/model" \
    --data "$DATA" --classifier "${CLASSIFIER:-}" --turns "${TURNS:-$OUT/turns}" \
    --features "${FEATURES:-lite0}" --out "$OUT/$name" "$@"
}
