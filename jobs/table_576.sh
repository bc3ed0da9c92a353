#!/usr/bin/env bash
# Every method on micro-576 at budgets of the papers, in two steps: trains RCP, then compares.
#   bash jobs/table_576.sh                        on the validation split
#   SPLIT="test" bash jobs/table_576.sh             once, when nothing is chosen any more
#   TRAIN= BUDGETS="32 16" bash jobs/table_576.sh --limit 90      no training; rows of runs that aren't there are left out
# Trained runs are in runs/rcp_576, results in runs/table_576; what is done is not done again. Training takes 15 minutes of
# one core a seed once the teacher cache is there, which takes 40 for each set of layers; comparing 360 questions takes hours.
set -euo pipefail

# shellcheck source=jobs/install.sh
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
RUN="${RUN:-runs/table_576}" RUNS="${RUNS:-runs/rcp_576}" SPLIT="${SPLIT:-val}" TRAIN="${TRAIN-0 1 2}"
read -ra BUDGETS <<<"${BUDGETS:-64 32 16}"
read -ra SEEDS <<<"$TRAIN"
P=configs/pruners

# train NAME SEED [options]: RCP on micro-576 in RUNS/NAME/seed_SEED
train() {
    local folder=$RUNS/$1/seed_$2 seed=$2
    shift 2
    [[ -f $folder/plugin/plugin.json ]] && return
    note "$folder"
    lit-prune fit -c configs/micro_576.yaml "$@" --trainer.default_root_dir="$folder" --trainer.limit_val_batches=10 \
        --ckpt_path last --seed_everything="$seed" --model.seed="$seed" --data.init_args.seed="$seed"
}

# One plug-in for all budgets, and what its parts are worth at half the length: the adapters, the place of the first stage, and
# questions of the other half of the skills. Then the paper's method with its own losses, and with ours.
salient=(-c "$P/rcp_salient.yaml" --trainer.max_epochs=3 --model.teacher_cache="$RUNS/teacher")
seven=(-c jobs/micro_576/seven_adapters.yaml)
paper=(--model.pruner.init_args.layers="[1,13,25]" --model.pruner.init_args.stage_ratios="[16.7,4.6,1.4]")
even="[behind,counting,dots,figures,layout,position,relation,shape,texture]"
odd="[colour,direction,existence,ground,pattern,region,same,size,words]"
short=--data.init_args.train_samples=2304
for seed in ${SEEDS[@]+"${SEEDS[@]}"}; do
    train salient "$seed" "${salient[@]}" "${seven[@]}" --data.init_args.train_samples=4608
    train two_adapters "$seed" "${salient[@]}" --data.init_args.train_samples=4608
done
if [[ -n $TRAIN ]]; then
    train short 0 "${salient[@]}" "${seven[@]}" $short
    train short_two_adapters 0 "${salient[@]}" $short
    train short_paper_layers 0 "${salient[@]}" $short "${paper[@]}"
    train half_even 0 "${salient[@]}" "${seven[@]}" $short --data.init_args.train_skills="$even"
    train half_odd 0 "${salient[@]}" "${seven[@]}" $short --data.init_args.train_skills="$odd"
    train published 0 -c "$P/rcp_published.yaml" --model.backward=kept $short
    train published_ours 0 -c "$P/rcp_published.yaml" $short --trainer.max_epochs=3 --model.teacher_cache="$RUNS/teacher" \
        --model.train_mode=drop --model.gate_clip=0.01 --model.gate_centre=true --model.anneal.noise=0 --model.loss.budget=20 \
        --model.loss.relative=true --model.loss.saliency=5 --model.loss.repair=10 --model.loss.stagewise=true
fi

# variant FILE NAME SED: a method's file with one line changed, in RUN/pruners
variant() {
    mkdir -p "$RUN/pruners"
    sed "$3" "$P/$1.yaml" >"$RUN/pruners/$2.yaml" || exit 1
    ! cmp -s "$P/$1.yaml" "$RUN/pruners/$2.yaml" || { echo "error: $2 is $1" >&2 && exit 1; }
    printf '%s' "$RUN/pruners/$2.yaml"
}
original='s/positions: renumbered/positions: original/'
# By assignments: inside the list below, a variant that is none wouldn't stop the job.
without_acgr=$(variant dcp dcp_without_acgr 's/acgr: true/acgr: false/')
without_tatcs=$(variant dcp dcp_without_tatcs 's/tatcs: true/tatcs: false/')
rcp_topk=$(variant rcp_published rcp_topk 's/select: threshold/select: topk/')

methods=(full "random=$P/random.yaml" "uniform=$P/uniform.yaml" "downsampling=$P/downsample.yaml" "FastV=$P/fastv.yaml"
    "SparseVLM=$P/sparsevlm.yaml" "VisionZip=$P/visionzip.yaml" "PruMerge+=$P/prumerge_plus.yaml" "ToMe=$P/tome.yaml"
    "DivPrune=$P/divprune.yaml" "DART=$P/dart.yaml" "CDPruner=$P/cdpruner.yaml" "SCOPE=$P/scope.yaml" "TOPS=$P/tops.yaml"
    "ID-Selection=$P/id_selection.yaml" "ERA's bias=$P/era_bias.yaml" "all-question attention=$P/text_attention.yaml"
    "word similarity=$P/text_similarity.yaml" "DCP-Prune=$P/dcp.yaml"
    "DCP-Prune, proportional attention=$P/dcp_proportional.yaml"
    "DCP-Prune without ACGR=$without_acgr" "DCP-Prune without TATCS=$without_tatcs")
for pair in visionzip=VisionZip divprune=DivPrune cdpruner=CDPruner scope=SCOPE tops=TOPS id_selection=ID-Selection; do
    placed=$(variant "${pair%%=*}" "${pair%%=*}_original" "$original")
    methods+=("${pair#*=}, original positions=$placed")
done
methods+=("RCP untrained=$rcp_topk"
    "Salient RCP untrained=$P/rcp_salient.yaml")
trained() {
    if [[ -f $2/plugin/plugin.json ]]; then
        methods+=("$1=$2/plugin")
    else
        note "no run in $2, so no row $1"
    fi
}
# seeds NAME: its trained plug-ins, with commas
seeds() {
    local folder found=""
    for folder in "$RUNS/$1"/seed_*; do
        [[ ! -f $folder/plugin/plugin.json ]] || found+=",$folder/plugin"
    done
    printf '%s' "${found#,}"
}
for run in "RCP as published=published" "RCP as published, our losses=published_ours" "Salient RCP, half the length=short" \
    "Salient RCP, two adapters, half the length=short_two_adapters" \
    "Salient RCP, two adapters, the paper's layers, half the length=short_paper_layers" \
    "Salient RCP, trained on one half of the skills=half_even" "Salient RCP, trained on the other half=half_odd"; do
    trained "${run%%=*}" "$RUNS/${run#*=}/seed_0"
done
for run in "Salient RCP=salient" "Salient RCP, two adapters=two_adapters"; do
    three=$(seeds "${run#*=}")
    [[ -z $three ]] ||
        methods+=("${run%%=*}=$three" "${run%%=*} without repair=$(sed 's/,/!,/g; s/$/!/' <<<"$three")")
done
methods+=("half background (knows the question's regions)=jobs/micro_576/pruners/half_background.yaml")

export PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}$PWD" # for the oracle of jobs/micro_576
lit-prune compare -c configs/micro_576.yaml --split "$SPLIT" --keep "${BUDGETS[@]}" --seeds 0 --groups 4 --out "$RUN" \
    --methods "${methods[@]}" "$@"
lit-prune report "$RUN" --out "$RUN/report.html" --markdown "$RUN/tables.md"
