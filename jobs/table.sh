#!/usr/bin/env bash
# The table of docs/comparison.md: every method at five budgets, what trains with three seeds. About two hours of one core.
#   bash jobs/table.sh                results in runs/table; what is done is not done again
#   SEEDS=0 bash jobs/table.sh --limit 128
set -euo pipefail

# shellcheck source=jobs/install.sh
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
RUN="${RUN:-runs/table}"
read -ra SEEDS <<<"${SEEDS:-0 1 2}"

for seed in "${SEEDS[@]}"; do
    seeded=(--seed_everything="$seed" --model.seed="$seed" --data.init_args.seed="$seed")
    for keep in 48 32 16; do
        fit_once "runs/seeds/keep_$keep/seed_$seed" --model.keep="$keep" "${seeded[@]}"
    done
    for keep in 8 4; do
        fit_once "runs/dcp_rcp/keep_$keep/seed_$seed" -c configs/pruners/dcp_rcp.yaml --model.keep="$keep" "${seeded[@]}"
    done
    [[ -d runs/adaptive/keep_16/seed_$seed ]] ||
        "$PY" jobs/adapt.py "runs/seeds/keep_16/seed_$seed/plugin" --keep 16 --out "runs/adaptive/keep_16/seed_$seed" --questions 256
done

P=configs/pruners
lit-prune compare -c configs/micro.yaml --split test --keep 48 32 16 8 4 --seeds "${SEEDS[@]}" --out "$RUN" "$@" --methods full \
    random=$P/random.yaml uniform=$P/uniform.yaml downsampling=$P/downsample.yaml FastV=$P/fastv.yaml \
    PyramidDrop=$P/pyramiddrop.yaml SparseVLM=$P/sparsevlm.yaml VisionZip=$P/visionzip.yaml PruMerge+=$P/prumerge_plus.yaml \
    ToMe=$P/tome.yaml \
    DivPrune=$P/divprune.yaml DART=$P/dart.yaml CDPruner=$P/cdpruner.yaml SCOPE=$P/scope.yaml DCP-Prune=$P/dcp.yaml \
    "DCP-Prune, proportional attention=$P/dcp_proportional.yaml" "all-question attention=$P/text_attention.yaml" \
    "word similarity=$P/text_similarity.yaml" "RCP=runs/seeds/keep_{keep}/seed_{seed}/plugin" \
    "RCP, adaptive=runs/adaptive/keep_{keep}/seed_{seed}" "RCP after DCP=runs/dcp_rcp/keep_{keep}/seed_{seed}/plugin" \
    "oracle (ceiling)=$P/oracle.yaml"
