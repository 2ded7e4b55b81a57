#!/usr/bin/env bash
# Every GPU test and benchmark of the project, under ten minutes on one card; numbers are appended
# to bench/results/. Without a GPU the parts that a CPU can do; `--cpu` asks for these alone.
#
#   bash bench/gpu.sh [--cpu] [--dry-run]
#
# --dry-run prints the commands and has each script parse its own, with --cpu those of a CPU.
# A part that fails or takes too long is named with its last words, and the next one begins (the
# exit status is 1 then); none may run beyond the ten minutes (LIMIT seconds), the last ones come
# when at least half of their time is left. `pip install -e '.[test]'` has what it needs, `pip
# install liger-kernel torchao` the peers that are compared where they are there. Triton, which
# comes with PyTorch, wants a C compiler and Python's headers.
# PYTHON names the interpreter, LEROBOT_PYTHON one that has lerobot, RUNS run folders whose control
# step is timed besides that of untrained models, NOTE is said beside the numbers. ONLY="a step"
# takes the parts whose names begin so: the compiled step may need a call of its own. OUT names a
# folder that has a copy of the numbers and of what was printed after each part.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$(command -v python || command -v python3)}
export HF_HUB_OFFLINE=1 # what is timed has random weights, and a machine without a network no wait
export PYTHONUNBUFFERED=1 # else what a part has printed is lost when its time is over
have=1 dry=
for word in "$@"; do
    case $word in
        --cpu) have=0 ;;
        --dry-run) dry=1 ;;
        *) echo "error: unknown flag $word, there are --cpu and --dry-run" >&2 && exit 2 ;;
    esac
done
if [ "$have" = 0 ]; then
    export CUDA_VISIBLE_DEVICES=
elif [ -z "$dry" ]; then
    have=$("$python" -c 'import torch; print(int(torch.cuda.is_available()))') || exit 2
fi
log=$(mktemp)
trap 'rm -f "$log"' EXIT
ended=() broken=0
note=(--note "${NOTE:-}")

part() { # name, seconds at most, command
    local name=$1 limit=$2 began=$SECONDS left=$((${LIMIT:-580} - SECONDS)) code
    shift 2
    case $name in
        "${ONLY:-}"*) ;;
        *) return ;;
    esac
    if [ -n "$dry" ]; then
        printf '%s, at most %s s\n ' "$name" "$limit"
        printf ' %q' "$@" | tee -a "$log"
        echo | tee -a "$log"
        return
    fi
    if [ "$left" -lt $((limit / 2)) ]; then
        skip "$name" "it may take $limit s, $((left > 0 ? left : 0)) are left"
        return
    fi
    local whole=$limit
    limit=$((limit < left ? limit : left))
    echo "=== $name"
    timeout -k 15 "$limit" "$@" 2>&1 | tee "$log"
    code=${PIPESTATUS[0]}
    case $code in
        0) ended+=("$name: done in $((SECONDS - began)) s") ;;
        124 | 137)
            ended+=("$name: stopped after $limit s")
            [ "$limit" -lt "$whole" ] || broken=1 # else the ten minutes were over, not its own time
            ;;
        *) broken=1 ended+=("$name: failed ($code), $(grep -v '^ *$' "$log" | tail -n 1 | cut -c -120)") ;;
    esac
    if [ -n "${OUT:-}" ]; then
        cat "$log" >>"$OUT/gpu.log"
        cp bench/results/*.jsonl "$OUT"
    fi
}

skip() { # name, reason
    ended+=("$1: skipped, $2")
}

if [ "$have" = 1 ]; then
    part "a step, Qwen3-VL-4B" 120 "$python" bench/step.py --random --steps 5 "${note[@]}" \
        --preset paper --frozen bf16
    part "fused losses" 60 "$python" bench/losses.py "${note[@]}"
    part "joint attention" 100 "$python" bench/attention.py "${note[@]}" # it compiles FlexAttention
    part "latency" 200 "$python" bench/latency.py --random --repeats 2 --seconds 1 "${note[@]}"
    # only the files that have such tests: to collect them all takes longer than to run these
    part "tests on the GPU" 90 "$python" -m pytest -q -m gpu $(grep -l 'mark\.gpu' tests/*.py)
    part "a step, VITA-1.5, stage 2" 90 "$python" bench/step.py --method vita_vla \
        --stage finetune --random --steps 3 "${note[@]}" --preset calvin --batch 4 --frozen bf16 \
        --grad-checkpoint
    part "a step, VITA-1.5, stage 1" 90 "$python" bench/step.py --method vita_vla --stage align \
        --random --steps 3 "${note[@]}" --preset calvin --batch 8 --frozen bf16 --grad-checkpoint
    part "a step, Eagle2" 90 "$python" bench/step.py --method dualvla --random --steps 3 \
        "${note[@]}" --preset paper --frozen bf16
    part "a left brain in 8 bits" 90 "$python" bench/fp8.py --random "${note[@]}" --preset paper
    part "a step, tiny" 60 "$python" bench/step.py "${note[@]}"
else
    echo "there is no GPU here: CPU parts only"
    for name in "tests on the GPU" "a step of each real backbone" "latency at real sizes"; do
        skip "$name" "there is no GPU"
    done
    part "fused losses" 80 "$python" bench/losses.py "${note[@]}"
    part "joint attention" 60 "$python" bench/attention.py "${note[@]}"
    part "a step, tiny" 80 "$python" bench/step.py --steps 3 --batch 16 "${note[@]}"
    part "latency, tiny" 80 "$python" bench/latency.py --repeats 3 --seconds 2 "${note[@]}"
fi
if [ -n "${RUNS:-}" ]; then # names without spaces
    part "latency of trained runs" 50 "$python" bench/latency.py $RUNS "${note[@]}"
else
    skip "latency of trained runs" "RUNS names no run folders"
fi
if [ -n "$dry" ] || "$python" -c 'import av, pyarrow' 2>>"$log"; then
    part "loader" 60 "$python" bench/loader.py --episodes 20 --side 128 --workers 0,1,2 --rounds 1 \
        --seconds 1 "${note[@]}" ${LEROBOT_PYTHON:+--lerobot-python "$LEROBOT_PYTHON"}
else
    skip "loader" "pip install -e '.[data]' has what it reads with"
fi
if [ "$have" = 1 ]; then
    part "a compiled step, Qwen3-VL-4B" 300 "$python" bench/step.py --random --steps 5 \
        --variants twin "${note[@]}" --preset paper --frozen bf16 --compile
fi
if [ -n "$dry" ]; then
    "$python" -c '
import importlib, shlex, sys
sys.path[:0] = ["bench", "."]
import common
def check():
    for _, script, *words in filter(None, map(shlex.split, sys.stdin)):
        if script != "-m":
            importlib.import_module(script[6:-3]).arguments(words)
common.run_main(check)' <"$log"
    exit
fi
echo "=== all"
printf '%s\n' "${ended[@]}" "$SECONDS s; lines in bench/results/"
exit $broken
