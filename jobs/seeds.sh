#!/usr/bin/env bash
# The README's tables: RCP trained with three seeds at 22.2 % and 11.1 % of the visual tokens, beside everything else.
#   bash jobs/seeds.sh                results in runs/seeds; a run done is not trained again
#   SEEDS="0 1 2 3 4" bash jobs/seeds.sh
set -euo pipefail

# shellcheck source=jobs/install.sh
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
RUN="${RUN:-runs/seeds}"
read -ra SEEDS <<<"${SEEDS:-0 1 2}"

for keep in 32 16; do
    for seed in "${SEEDS[@]}"; do
        fit_once "$RUN/keep_$keep/seed_$seed" --model.keep="$keep" \
            --seed_everything="$seed" --model.seed="$seed" --data.init_args.seed="$seed" "$@"
    done
done
trained="$RUN/keep_{keep}/seed_{seed}/plugin"
lit-prune compare -c configs/micro.yaml --split test --keep 32 16 --seeds "${SEEDS[@]}" --out "$RUN" --methods full \
    random=configs/pruners/random.yaml \
    uniform=configs/pruners/uniform.yaml \
    "last-token attention (FastV)=configs/pruners/fastv.yaml" \
    "all-question attention=configs/pruners/text_attention.yaml" \
    "word similarity=configs/pruners/text_similarity.yaml" \
    "RCP untrained=configs/pruners/rcp.yaml" \
    "RCP trained, repair off=$trained!" \
    "RCP trained=$trained" \
    "oracle (ceiling)=configs/pruners/oracle.yaml"
