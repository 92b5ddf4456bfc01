#!/usr/bin/env bash
# Everything to run on the day a GPU is at hand:  bench/gpu.sh [GLUE]
# Tests on CUDA; speed and memory of a step, eager, compiled and with CUDA graphs, beside transformers' modules; an
# MRPC epoch if GLUE is a folder laid out as the official zips are. Each stage takes under nine minutes and leaves a
# file in $OUT; call it again, and stages that ended are skipped. Prints one table and writes $OUT/gpu.json.
# SIZES="tiny" STAGES=1 is a trial on a CPU: STAGES is the number of stages to run, by default all.
set -uo pipefail
glue=${1:+$(realpath "$1")}
cd "$(dirname "$0")/.."
device=$(python -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')
OUT=${OUT:-out/gpu-$device}
SIZES=${SIZES:-small base}
left=${STAGES:-1000}
mkdir -p "$OUT"

stage() {  # NAME COMMAND...: writes $OUT/NAME.txt, or .failed
    local name=$1
    shift
    if [[ -e $OUT/$name.txt || -e $OUT/$name.failed || $left -le 0 ]]; then
        return
    fi
    left=$((left - 1))
    echo "== $name: $*"
    if timeout 540 "$@" > "$OUT/$name.part" 2>&1; then
        mv "$OUT/$name.part" "$OUT/$name.txt"
    else
        mv "$OUT/$name.part" "$OUT/$name.failed"
        echo "   failed or took over nine minutes; see $OUT/$name.failed, and delete it to try again"
    fi
}

if python -c "import pytest" 2> /dev/null; then
    stage tests python -m pytest -q -m cuda -p no:cacheprovider
else
    echo "pytest is not installed: the tests are skipped"
fi
for size in $SIZES; do
    for mode in "" "--compile" "--compile --cuda-graphs"; do
        name=$size$(echo "$mode" | tr -d ' ')
        # shellcheck disable=SC2086
        stage "$name" python bench/pretrain.py --size "$size" $mode --json "$OUT/$name.json"
    done
done
if [[ -n $glue ]]; then
    stage mrpc python bench/mrpc.py --glue-dir "$glue" --size "${SIZES%% *}" --json "$OUT/mrpc.json"
else
    echo "no GLUE folder was given: the MRPC epoch is skipped"
fi
python bench/gpu_report.py "$OUT"
