#!/usr/bin/env bash
# Every GPU test and benchmark in one call; leaves JSON and JUnit files in $OUT (default: benchmarks/results).
# Needs torch with CUDA, triton, pytest, hypothesis, numpy, safetensors and tqdm; not an installed package.
#
#     benchmarks/gpu_suite.sh [seconds]      # limit for the whole, default 470
set -u
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
out="${OUT:-benchmarks/results}"
deadline=$((SECONDS + ${1:-470}))
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" SCORE_REQUIRE_GPU=1
failed=0

step() {
  local name="$1" limit=$((deadline - SECONDS))
  shift
  if ((limit < 5)); then
    echo "== $name: NOT RUN, the time is up"
    failed=1
    return
  fi
  echo "== $name ($limit s left)"
  timeout "$limit" "$@" || { echo "== $name: FAILED ($?)"; failed=1; }
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || true
# Correctness first. --confcutdir: the other tiers' fixtures need packages that a GPU machine may lack.
step parity "$python" -m pytest -q -p no:cacheprovider --confcutdir=tests/kernels/parity \
  --junitxml="$out/gpu_parity.xml" tests/kernels/parity
step gpu-tests "$python" -m pytest -q -p no:cacheprovider --confcutdir=tests/gpu \
  --junitxml="$out/gpu_tests.xml" tests/gpu/test_kernels.py
if ((failed)); then
  echo "== benchmarks: NOT RUN, a test failed"
  exit 1
fi
step kernels "$python" benchmarks/kernels.py --out "$out/kernels_gpu.json"
step tune "$python" benchmarks/kernels.py --tune --repeats 10 --out "$out/kernels_tune.json"
exit "$failed"
