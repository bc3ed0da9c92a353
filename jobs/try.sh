#!/usr/bin/env bash
# The main job from nothing: install, train RCP on the shipped micro-LLaVA, test it, compare it with other methods.
#   bash jobs/try.sh                      results in runs/try; interrupted, the same command goes on
#   bash jobs/try.sh --fresh              start again (runs/try is moved aside)
#   bash jobs/try.sh --fresh --model.keep=32     further arguments go to `fit` and `test`
#   bash jobs/try.sh --smoke              a few steps and questions of everything, in a minute: does it run?
#   RUN=runs/seed1 bash jobs/try.sh --seed_everything=1 --model.seed=1     another folder
# About 5 minutes on two free CPU cores after the install; nothing is fetched while it runs.
set -euo pipefail

# shellcheck source=jobs/install.sh
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"

# The model is tiny: a second thread gains little, and waits where other jobs hold the cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

CONFIG=configs/micro.yaml
FRESH=""
LIMIT=()
FEW=()
while [[ ${1-} == --fresh || ${1-} == --smoke ]]; do
    if [[ $1 == --fresh ]]; then
        FRESH=1
    else
        RUN="${RUN:-runs/smoke}"
        LIMIT=(--limit 14 --seeds 0)
        FEW=(--trainer.limit_val_batches=1 --data.init_args.train_samples=16 --data.init_args.val_samples=8
            --data.init_args.test_samples=14 --data.init_args.batch_size=4)
    fi
    shift
done
set -- ${FEW[@]+"${FEW[@]}"} "$@"
RUN="${RUN:-runs/try}"

# The rows of the table: NAME=PATH of a pruner's configuration or of a folder with a trained plug-in.
ROWS=(
    full
    random=configs/pruners/random.yaml
    uniform=configs/pruners/uniform.yaml
    "last-token attention (FastV)=configs/pruners/fastv.yaml"
    "all-question attention=configs/pruners/text_attention.yaml"
    "word similarity=configs/pruners/text_similarity.yaml"
    "RCP untrained=configs/pruners/rcp.yaml"
    "RCP trained, repair off=$RUN/plugin!"
    "RCP trained=$RUN/plugin"
    "oracle (ceiling)=configs/pruners/oracle.yaml"
)

if [[ -n $FRESH && -e $RUN ]]; then
    mv "$RUN" "$RUN.$(date +%Y%m%d-%H%M%S)"
fi
mkdir -p "$RUN"
if [[ -f $RUN/settings && "$(cat "$RUN/settings")" != "$*" ]]; then
    echo "error: $RUN was begun with other arguments ('$(cat "$RUN/settings")'); repeat them or add --fresh" >&2
    exit 2
fi
printf '%s' "$*" >"$RUN/settings"

# Each step leaves a mark when it has ended well, so that the same command goes on where it stopped.
step() {
    local name=$1
    shift
    if [[ -f $RUN/$name.done ]]; then
        note "$name: done before"
        return
    fi
    note "$name"
    "$@"
    touch "$RUN/$name.done"
}

step fit lit-prune fit -c "$CONFIG" --trainer.default_root_dir="$RUN" --ckpt_path last "$@"
step test lit-prune test -c "$CONFIG" --trainer.default_root_dir="$RUN" --ckpt_path last "$@"
# The comparison reads the settings that `fit` resolved and saved; it is quick to repeat and prints the table.
note "compare"
lit-prune compare -c "$RUN/config_fit.yaml" --split test --methods "${ROWS[@]}" --out "$RUN" ${LIMIT[@]+"${LIMIT[@]}"}
note "written: $RUN/results.json, $RUN/table.md and plots"
