#!/usr/bin/env bash
# Everything that only a GPU can show, in stages: bash bench/gpu.sh quick|full|STAGE ... (see bench/gpu_stages.py).
cd "$(dirname "$0")/.." || exit
PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} exec "${PY:-python3}" -m bench.gpu_stages "${@:-quick}"
