#!/usr/bin/env bash
# A short pre-training run on a GPU and what it is good for:  bench/short_run_on_gpu.sh STEPS TEXT GLUE
# Pre-trains small by its recipe, decayed over STEPS, on a folder of text; then PROCESSES (4) processes share the
# fine-tuning of CoLA, MRPC, STS-B and SST-2 with SEEDS (3) seeds each. On an H100: a minute for compiling, 12 ms a
# step, and some four minutes for fine-tuning. Each part stops after LIMIT (500) seconds; the same command goes on.
# VOCAB is BERT's, downloaded, or a file. MORE has more flags for train.py; a short run wants a short warm-up:
# MORE="--num-warmup-steps 1500" for 20,000 steps. SIZE=tiny is a trial on a CPU.
set -euo pipefail
if [[ $# -lt 3 ]]; then
    sed -n 2,7p "$0"
    exit 1
fi
steps=$1 text=$(realpath "$2") glue=$(realpath "$3")
cd "$(dirname "$0")/.."
LIMIT=${LIMIT:-500} SIZE=${SIZE:-small} SEEDS=${SEEDS:-3} PROCESSES=${PROCESSES:-4} VOCAB=${VOCAB:-bert}
OUT=${OUT:-out/short_run}

timeout -s TERM "$LIMIT" python train.py --size "$SIZE" --num-train-steps "$steps" --data "$text" --vocab "$VOCAB" \
    --out "$OUT" ${MORE:-}
length=$(python -c "import json; print(json.load(open('$OUT/$SIZE/discriminator/tokenizer_config.json'))['model_max_length'])")
finetune=(python finetune.py --task cola mrpc stsb sst2 --seeds "$SEEDS" --model "$OUT/$SIZE" --glue-dir "$glue"
          --max-length "$length" --out "$OUT/glue")
for _ in $(seq "$PROCESSES"); do
    OMP_NUM_THREADS=2 timeout -s TERM "$LIMIT" "${finetune[@]}" > /dev/null &
done
wait
timeout -s TERM "$LIMIT" "${finetune[@]}"  # the table, and what another process left unfinished
