#!/usr/bin/env bash
# The GPU tests, the kernel and prefill benchmarks in one call; leaves JSON and JUnit files in $OUT (default: benchmarks/results).
# Needs torch with CUDA, triton, pytest, hypothesis, numpy, safetensors and tqdm; not an installed package. The prefill
# benchmark also needs transformers and pydantic, and for its vLLM rows vllm and this package installed (vLLM finds the plug-in by its
# entry point); what is missing is said and left out.
#
#     benchmarks/gpu_suite.sh [seconds] [prefill]   # limit for the whole, default 470; prefill: those benchmarks alone
set -u
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
out="${OUT:-benchmarks/results}"
deadline=$((SECONDS + ${1:-470}))
only="${2:-}"
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

prefill() {
  if ! "$python" -c "import transformers, pydantic" 2>/dev/null; then
    echo "== prefill: NOT RUN, transformers or pydantic is not installed"
    return
  fi
  # Each checks its answers itself and writes its file as rows are done: a time limit costs only what is left.
  local bench="benchmarks/prefill_latency.py"
  step prefill-paper "$python" "$bench" --preset paper --output "$out/prefill_latency_paper.json"
  for preset in qwen3-vl-8b qwen3.5-9b llava-video-7b; do
    step "prefill-$preset" "$python" "$bench" --preset "$preset" --output "$out/prefill_latency_$preset.json"
  done
  step prefill-methods "$python" "$bench" --preset paper --engines transformers --methods all --repeats 3 \
    --output "$out/prefill_latency_paper-methods.json"
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || true
if [[ "$only" == prefill ]]; then
  prefill
  exit "$failed"
fi
# Correctness first. --confcutdir: the other tiers' fixtures need packages that a GPU machine may lack.
step parity "$python" -m pytest -q -p no:cacheprovider --confcutdir=tests/kernels/parity \
  --junitxml="$out/gpu_parity.xml" tests/kernels/parity
step gpu-tests "$python" -m pytest -q -p no:cacheprovider --confcutdir=tests/gpu \
  --junitxml="$out/gpu_tests.xml" tests/gpu/test_kernels.py
if "$python" -c "import vllm, score_vllm" 2>/dev/null; then
  # Engines: sleep mode, the encoder's CUDA graphs, the cell cache.
  step gpu-engines "$python" -m pytest -q -p no:cacheprovider --junitxml="$out/gpu_engines.xml" \
    tests/gpu/test_sleep.py tests/gpu/test_encoder_graphs.py
else
  echo "== gpu-engines: NOT RUN, vllm or score-vllm is not installed"
fi
if ((failed)); then
  echo "== benchmarks: NOT RUN, a test failed"
  exit 1
fi
step kernels "$python" benchmarks/kernels.py --out "$out/kernels_gpu.json"
prefill
step tune "$python" benchmarks/kernels.py --tune --repeats 10 --out "$out/kernels_tune.json"
exit "$failed"
