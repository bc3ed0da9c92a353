#!/usr/bin/env bash
# The main job from nothing: install, train RCP on the shipped micro-LLaVA, test it, compare it with other methods.
#   bash jobs/try.sh                      results in runs/try; interrupted, the same command goes on
#   bash jobs/try.sh --fresh              start again (runs/try is moved aside)
#   bash jobs/try.sh --model.keep=32      further arguments go to `fit` and `test` (a new setting wants --fresh)
# About 12 minutes on two CPU cores after the install; nothing is fetched while it runs.
set -euo pipefail

if [[ ${1-} == -h || ${1-} == --help ]]; then
    sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
    exit
fi
# shellcheck source=jobs/install.sh
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"

export WANDB_MODE="${WANDB_MODE:-offline}" HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
RUN=runs/try
CONFIG=configs/micro.yaml # writes its checkpoints and exports into $RUN

if [[ ${1-} == --fresh ]]; then
    shift
    [[ ! -e $RUN ]] || mv "$RUN" "$RUN.$(date +%Y%m%d-%H%M%S)"
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
    note "$name: $*"
    "$@"
    touch "$RUN/$name.done"
}

step fit lit-prune fit -c "$CONFIG" --ckpt_path last "$@"
step test lit-prune test -c "$CONFIG" --ckpt_path last "$@"
step compare lit-prune compare -c "$CONFIG" --out "$RUN" --methods \
    full \
    random=configs/pruners/random.yaml \
    uniform=configs/pruners/uniform.yaml \
    "last-token attention (FastV)=configs/pruners/fastv.yaml" \
    "all-question attention=configs/pruners/text_attention.yaml" \
    "word similarity=configs/pruners/text_similarity.yaml" \
    "RCP untrained=configs/pruners/rcp.yaml" \
    "RCP trained, repair off=$RUN/plugin!" \
    "RCP trained=$RUN/plugin" \
    "oracle (ceiling)=configs/pruners/oracle.yaml"
note "table: $RUN/table.json and table.csv; plug-in: $RUN/plugin"
