#!/usr/bin/env bash
# What has never been run on a GPU, in one go, for a machine that has one for a short while.
#
#     bash tests/gpu_check.sh OUT            at most nine minutes: tests, whole runs, speed, memory
#     bash tests/gpu_check.sh OUT profile    at most four: what a step spends its time on
#
# Each step has its own limit, so that one that hangs takes no other's time. OUT gets its output
# (NAME.log), the rows of bench.py (NAME.json), the runs, and steps.txt: what ended how, in seconds.
# MODEL names the checkpoint of the whole runs (the default model; it has to be in the cache or in a
# folder). bench.py --shape needs no weights, but the default model's tokenizer.
set -uo pipefail
out=$(mkdir -p "${1:?the folder for the results}" && cd "$1" && pwd)
cd "$(dirname "$0")/.."
model=(${MODEL:+--model "$MODEL"})

step() {  # NAME SECONDS COMMAND...
    local name=$1 limit=$2 begun=$SECONDS
    shift 2
    echo "== $name: $*"
    timeout -k 10 "$limit" "$@" 2>&1 | tee "$out/$name.log" | tail -n 30
    echo "$name: status ${PIPESTATUS[0]}, $((SECONDS - begun)) s of $limit" | tee -a "$out/steps.txt"
}

shape() {  # NAME SECONDS PARTS
    step "bench-$1" "$2" python bench.py --shape "$1" --only "$3" --repeats 3 \
        --json "$out/bench-$1.json"
}

if [ "${2:-}" = profile ]; then
    for name in qwen2.5-0.5b qwen2.5-7b; do
        step "profile-$name" 110 python bench.py --shape $name --only profile \
            --json "$out/profile-$name.json"
    done
    exit
fi
nvidia-smi | tee "$out/card.txt"
step tests 60 python -m pytest -q -m cuda tests/test_cuda.py
step quick 50 python train.py "${model[@]}" --quick --out "$out/quick"
# Beside the peaks: those of a run are in its report.md, that of a training step is a row of bench.py.
step plan 10 python train.py "${model[@]}" --dry-run
step plan-7b 10 python train.py --model tests/shapes/qwen2.5-7b.json --dry-run
shape qwen2.5-0.5b 90 decoding,routing,lora,kl,sampler,generation
# The same decoding in CUDA graphs, which are off unless asked for until they have run once.
step bench-graphs 30 env PRISM_STATIC=1 python bench.py --shape qwen2.5-0.5b --no-peer \
    --only generation --repeats 3 --json "$out/bench-graphs.json"
shape qwen2.5-7b 100 decoding,routing,lora,generation
step default 190 python train.py "${model[@]}" --out "$out/default"
