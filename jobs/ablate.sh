#!/usr/bin/env bash
# What each part of RCP is worth: trains variants that differ in one thing, compares them on the test set.
#   bash jobs/ablate.sh               results in runs/ablate; a variant done is not trained again
#   bash jobs/ablate.sh --data.init_args.train_samples=3200    further arguments go to every `fit`
#   LIMIT=256 bash jobs/ablate.sh     compares on the first 256 test questions only
set -euo pipefail

# shellcheck source=jobs/install.sh
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
RUN="${RUN:-runs/ablate}"
MORE=("$@")
ROWS=(full)

variant() {
    local name=$1 folder
    shift
    folder="$RUN/${name//[^a-z0-9]/_}"
    ROWS+=("$name=$folder/plugin")
    fit_once "$folder" "$@" "${MORE[@]}"
}

P=--model.pruner.init_args
variant "all parts"
variant "no attention loss" --model.loss.attention=0
variant "no gate clipping" --model.gate_clip=null
variant "no repair loss" --model.loss.repair=0
variant "means only" --model.loss.variance=0
variant "no repair adapter" --model.repair=null
variant "no attention baseline" "$P.baseline=none"
variant "one pruner" "$P.layers=[1]" "$P.shape=[1]" "--model.repair.init_args.stages=[0,0]"
variant "two pruners" "$P.layers=[1,9]" "$P.shape=[10,4]" "--model.repair.init_args.stages=[1,1]"
variant "threshold" "$P.select=threshold"
lit-prune compare -c configs/micro.yaml --split test --methods "${ROWS[@]}" --out "$RUN" ${LIMIT:+--limit "$LIMIT"}
