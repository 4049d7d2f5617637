#!/usr/bin/env bash
# Everything that only a GPU can show, in one command: bash bench/gpu.sh quick|full
# Needs no network: it uses the Python (PY=python3) and the torch, triton and pytest that are there. Each step has a time
# limit, both modes end within nine minutes, and the table comes last. The exit status is that of the worst step.
set -uo pipefail
mode=${1:-quick}
case $mode in quick|full) ;; *) echo "usage: bash bench/gpu.sh quick|full" >&2; exit 2 ;; esac
cd "$(dirname "$0")/.."
py=${PY:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$PWD/build/triton}
export MAX_JOBS=${MAX_JOBS:-$(nproc)}
unset TRITON_INTERPRET
worst=0
step() { # seconds, name, command...
  local seconds=$1 name=$2; shift 2
  echo "== $name"; local start=$SECONDS
  timeout "$seconds" "$@"; local status=$?
  [ $status -eq 124 ] && echo "$name: stopped after $seconds s"
  [ $status -gt $worst ] && worst=$status
  echo "== $name: status $status, $((SECONDS - start)) s"
}
"$py" -c 'import torch, triton; assert torch.cuda.is_available(); print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__)' ||
  { echo "bench/gpu.sh: needs a CUDA device, torch and triton" >&2; exit 2; }
step 60 "build" "$py" setup.py -q build_ext --inplace
if [ "$mode" = quick ]; then
  step 150 "tests" "$py" -m pytest -q -x tests/test_gpu.py
  tools="memcheck" each=45
else
  step 150 "tests" "$py" -m pytest -q tests/test_gpu.py tests/test_triton_engine.py tests/test_triton_sparse.py tests/test_cuda_engine.py
  tools="memcheck racecheck initcheck synccheck" each=28
fi
if command -v compute-sanitizer >/dev/null; then
  for tool in $tools; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 CUDA_LAUNCH_BLOCKING=1 step $each "compute-sanitizer $tool" \
      compute-sanitizer --tool "$tool" --error-exitcode 9 "$py" -m bench.gpu sanitize
  done
else
  echo "== compute-sanitizer: skipped, it is not on PATH"
fi
if [ "$mode" = full ] && command -v ncu >/dev/null; then
  metrics=sm__throughput.avg.pct_of_peak_sustained_elapsed,gpu__time_duration.sum,lts__t_sectors.avg.pct_of_peak_sustained_elapsed
  metrics+=,sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active
  step 35 "ncu" ncu --kernel-name regex:fused_ --launch-count 4 --metrics "$metrics" "$py" -m bench.gpu profile
fi
step 180 "benchmark" "$py" -m bench.gpu "$mode"
"$py" -m bench.tables --print gpu
exit $worst
