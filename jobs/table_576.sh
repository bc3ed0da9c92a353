#!/usr/bin/env bash
# Every method on micro-576 at the papers' budgets of 576 visual tokens.
#   bash jobs/table_576.sh                        training-free methods and untrained RCP, on the validation split
#   SPLIT=test bash jobs/table_576.sh             once, when nothing is chosen any more
#   BUDGETS="32 16" bash jobs/table_576.sh --limit 90
# Results in runs/table_576; what is done is not done again.
set -euo pipefail

# shellcheck source=jobs/install.sh
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
RUN="${RUN:-runs/table_576}" SPLIT="${SPLIT:-val}"
read -ra BUDGETS <<<"${BUDGETS:-192 128 64 32 16}"

P=configs/pruners
export PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}$PWD" # for the oracles of jobs/micro_576
lit-prune compare -c configs/micro_576.yaml --split "$SPLIT" --keep "${BUDGETS[@]}" --seeds 0 --out "$RUN" "$@" --methods full \
    random=$P/random.yaml uniform=$P/uniform.yaml downsampling=$P/downsample.yaml FastV=$P/fastv.yaml \
    PyramidDrop=$P/pyramiddrop.yaml SparseVLM=$P/sparsevlm.yaml VisionZip=$P/visionzip.yaml PruMerge+=$P/prumerge_plus.yaml \
    ToMe=$P/tome.yaml DivPrune=$P/divprune.yaml DART=$P/dart.yaml CDPruner=$P/cdpruner.yaml SCOPE=$P/scope.yaml \
    TOPS=$P/tops.yaml ID-Selection=$P/id_selection.yaml "ERA's bias=$P/era_bias.yaml" DCP-Prune=$P/dcp.yaml \
    "DCP-Prune, proportional attention=$P/dcp_proportional.yaml" "all-question attention=$P/text_attention.yaml" \
    "word similarity=$P/text_similarity.yaml" "RCP untrained, top-k=configs/micro_576.yaml" \
    "half background (knows the question's regions)=jobs/micro_576/pruners/half_background.yaml"
