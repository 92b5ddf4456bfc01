#!/usr/bin/env bash
# A short pre-training run and what it is good for:  bench/gpu_run.sh STEPS TEXT GLUE
# Pre-trains small by its recipe, decayed over STEPS, on a folder of text; then fine-tunes CoLA, MRPC, STS-B and SST-2
# with five seeds, and prints curve and table. It stops after $LIMIT seconds, by default 500, and is called again to go
# on where it stopped; a seed must fit into $LIMIT. SIZE=tiny SEEDS=1 is a trial on a CPU. VOCAB is BERT's, downloaded,
# or a file. MORE has more flags for train.py.
set -uo pipefail
if [[ $# -lt 3 ]]; then
    sed -n 2,7p "$0"
    exit 1
fi
steps=$1 text=$(realpath "$2") glue=$(realpath "$3")
cd "$(dirname "$0")/.."
LIMIT=${LIMIT:-500} SIZE=${SIZE:-small} SEEDS=${SEEDS:-5} VOCAB=${VOCAB:-bert} OUT=${OUT:-out/gpu_run}
run="$OUT/$SIZE"
began=$SECONDS

limited() {  # stops the command in time to save
    local seconds=$((LIMIT - SECONDS + began)) status=124
    if [[ $seconds -gt 0 ]]; then
        timeout -s INT "$seconds" "$@"
        status=$?
    fi
    if [[ $status -eq 124 ]]; then
        echo "not finished; call it again to go on"
    fi
    if [[ $status -ne 0 ]]; then
        exit "$status"
    fi
}

limited python train.py --size "$SIZE" --num-train-steps "$steps" --data "$text" --vocab "$VOCAB" --out "$OUT" ${MORE:-}
python - "$run" <<'PYTHON'
import json, sys
lines = [json.loads(line) for line in open(f"{sys.argv[1]}/log.jsonl")]
last = [line for line in lines if line.get("split") == "train"][-1]
print(f"{last['step']} steps, {last['tokens']:,} tokens; the last batch is of pass {last['epoch'] + 1} over the text")
for line in lines:
    if line.get("split") == "heldout":
        print(f"step {line['step']}: MLM loss {line['mlm_loss']:.3f}, discriminator loss {line['disc_loss']:.4f} "
              f"(all original: {line['all_original']:.4f}), AUC {line['auc']:.3f}")
PYTHON
length=$(python -c "import json; print(json.load(open('$run/discriminator/tokenizer_config.json'))['model_max_length'])")
limited python finetune.py --task cola mrpc stsb sst2 --seeds "$SEEDS" --model "$run" --glue-dir "$glue" \
    --max-length "$length" --out "$OUT/glue"
