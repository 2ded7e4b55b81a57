#!/usr/bin/env bash
# Every GPU test and benchmark of the project, under ten minutes on one card; numbers are appended
# to bench/results/. Without a GPU the parts that a CPU can do; `--cpu` asks for these alone.
#
#   bash bench/gpu.sh [--cpu]
#
# A part that fails or takes too long is named with its last words, and the next one begins.
# PYTHON names the interpreter, LEROBOT_PYTHON one that has lerobot, RUN a run folder of
# vita_vla.py (the chain's) for the latency of a control step.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
if [ "${1:-}" = --cpu ]; then
    export CUDA_VISIBLE_DEVICES=
fi
have=$("$python" -c 'import torch; print(int(torch.cuda.is_available()))') || exit 2
log=$(mktemp)
trap 'rm -f "$log"' EXIT
ended=()

part() { # name, seconds at most, command
    local name=$1 limit=$2 began=$SECONDS code
    shift 2
    echo "=== $name"
    timeout -k 5 "$limit" "$@" 2>&1 | tee "$log"
    code=${PIPESTATUS[0]}
    case $code in
        0) ended+=("$name: done in $((SECONDS - began)) s") ;;
        124 | 137) ended+=("$name: stopped after $limit s") ;;
        *) ended+=("$name: failed ($code), $(grep -v '^ *$' "$log" | tail -n 1 | cut -c -120)") ;;
    esac
}

skip() { # name, reason
    ended+=("$1: skipped, $2")
}

if [ "$have" = 1 ]; then
    part "tests on the GPU" 100 "$python" -m pytest -q -m gpu
    part "fused losses" 80 "$python" bench/losses.py
    part "joint attention" 80 "$python" bench/attention.py
    part "a step, tiny" 50 "$python" bench/step.py
    part "a step, Qwen3-VL-4B" 110 "$python" bench/step.py --backbone Qwen3-VL-4B --random \
        --side 224 --batch 8 --steps 5
else
    echo "there is no GPU here: CPU parts only"
    for name in "tests on the GPU" "a step, Qwen3-VL-4B"; do
        skip "$name" "there is no GPU"
    done
    part "fused losses" 80 "$python" bench/losses.py
    part "joint attention" 60 "$python" bench/attention.py --left 256 --right 256 --batch 1 \
        --repeats 3
    part "a step, tiny" 80 "$python" bench/step.py --steps 3 --batch 16
fi
if [ -n "${RUN:-}" ]; then
    part "latency" 50 "$python" bench/latency.py "$RUN/teacher" "$RUN/finetune"
else
    skip "latency" "RUN names no run folder of vita_vla.py"
fi
part "loader" 80 "$python" bench/loader.py --episodes 20 --side 128 --workers 0,2 --rounds 2 \
    --seconds 1.5 ${LEROBOT_PYTHON:+--lerobot-python "$LEROBOT_PYTHON"}
echo "=== all"
printf '%s\n' "${ended[@]}" "$SECONDS s; lines in bench/results/"
