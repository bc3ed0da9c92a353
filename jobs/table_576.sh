#!/usr/bin/env bash
# Every method on micro-576 at the papers' budgets, in two steps: trains RCP, then compares.
#   bash jobs/table_576.sh                        on the validation split
#   SPLIT="test" bash jobs/table_576.sh             once, when nothing is chosen any more
#   TRAIN= BUDGETS="32 16" bash jobs/table_576.sh --limit 90      no training; rows of runs that aren't there are left out
# Trained runs are in runs/rcp_576, results in runs/table_576; what is done is not done again. TRAIN names seeds: Salient RCP is
# trained with each, its parts and variants with the first. Training takes 15 minutes of one core once the teacher cache is
# there, which takes 40 for each set of layers; comparing 360 questions takes hours.
set -euo pipefail

# shellcheck source=jobs/install.sh
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
RUN="${RUN:-runs/table_576}" RUNS="${RUNS:-runs/rcp_576}" SPLIT="${SPLIT:-val}" TRAIN="${TRAIN-0 1 2}"
read -ra BUDGETS <<<"${BUDGETS:-192 128 64 32 16}"
read -ra SEEDS <<<"$TRAIN"
P=configs/pruners

# variant FILE NAME SED: a method's file with one line changed, in RUN/pruners
variant() {
    mkdir -p "$RUN/pruners"
    sed "$3" "$P/$1.yaml" >"$RUN/pruners/$2.yaml" || exit 1
    ! cmp -s "$P/$1.yaml" "$RUN/pruners/$2.yaml" || { echo "error: $2 is $1" >&2 && exit 1; }
    printf '%s' "$RUN/pruners/$2.yaml"
}
# Before the hours of training, and by assignments: inside a list, a variant that is none wouldn't stop the job.
without_acgr=$(variant dcp dcp_without_acgr 's/acgr: true/acgr: false/')
without_tatcs=$(variant dcp dcp_without_tatcs 's/tatcs: true/tatcs: false/')
rcp_topk=$(variant rcp_published rcp_topk 's/select: threshold/select: topk/')
originals=()
for pair in visionzip=VisionZip divprune=DivPrune cdpruner=CDPruner scope=SCOPE tops=TOPS id_selection=ID-Selection; do
    placed=$(variant "${pair%%=*}" "${pair%%=*}_original" 's/positions: renumbered/positions: original/')
    originals+=("${pair#*=}, original positions=$placed")
done

# train NAME SEED [options]: RCP on micro-576 in RUNS/NAME/seed_SEED
train() {
    local folder=$RUNS/$1/seed_$2 seed=$2
    shift 2
    [[ -f $folder/plugin/plugin.json ]] && return
    note "$folder"
    lit-prune fit -c configs/micro_576.yaml "$@" --trainer.default_root_dir="$folder" --trainer.limit_val_batches=10 \
        --ckpt_path last --seed_everything="$seed" --model.seed="$seed" --data.init_args.seed="$seed"
}

# 1. One plug-in for all budgets.
cached=(--trainer.max_epochs=3 --model.teacher_cache="$RUNS/teacher")
salient=(-c "$P/rcp_salient.yaml" "${cached[@]}") seven=(-c jobs/micro_576/seven_adapters.yaml)
long=--data.init_args.train_samples=4608 short=--data.init_args.train_samples=2304
for seed in ${SEEDS[@]+"${SEEDS[@]}"}; do
    train salient "$seed" "${salient[@]}" "${seven[@]}" $long
    train two_adapters "$seed" "${salient[@]}" $long
done
# 2. Of the first seed: what its parts are worth at half the length, and questions of the other half of the skills; the same
#    plug-in with an adaptive budget; the repair adapters on methods without training; the paper's method with its own losses,
#    and with ours.
if [[ -n $TRAIN ]]; then
    first=${SEEDS[0]}
    paper=(--model.pruner.init_args.layers="[1,13,25]" --model.pruner.init_args.stage_ratios="[16.7,4.6,1.4]")
    even="[behind,counting,dots,figures,layout,position,relation,shape,texture]"
    odd="[colour,direction,existence,ground,pattern,region,same,size,words]"
    train short "$first" "${salient[@]}" "${seven[@]}" $short
    train short_two_adapters "$first" "${salient[@]}" $short
    train short_paper_layers "$first" "${salient[@]}" $short "${paper[@]}"
    train half_even "$first" "${salient[@]}" "${seven[@]}" $short --data.init_args.train_skills="$even"
    train half_odd "$first" "${salient[@]}" "${seven[@]}" $short --data.init_args.train_skills="$odd"
    for keep in 64 16; do
        adaptive=$RUNS/adaptive/keep_$keep
        [[ -d $adaptive ]] || "$PY" jobs/adapt.py "$RUNS/salient/seed_$first/plugin" --keep "$keep" --out "$adaptive" \
            --config configs/micro_576.yaml --questions 180
    done
    alone=(-c jobs/micro_576/repair_alone.yaml "${cached[@]}" "$short")
    train divprune_repair "$first" -c "$P/divprune.yaml" "${alone[@]}"
    train tops_repair "$first" -c "$P/tops.yaml" "${alone[@]}" --model.repair.init_args.stages="[0,0,0,1,1,1,1]"
    train published "$first" -c "$P/rcp_published.yaml" --model.backward=kept $short
    train published_ours "$first" -c "$P/rcp_published.yaml" $short "${cached[@]}" \
        --model.train_mode=drop --model.gate_clip=0.01 --model.gate_centre=true --model.anneal.noise=0 --model.loss.budget=20 \
        --model.loss.relative=true --model.loss.saliency=5 --model.loss.repair=10 --model.loss.stagewise=true
fi

# 3. Rows: training-free methods, runs, the oracle.
methods=(full "random=$P/random.yaml" "uniform=$P/uniform.yaml" "downsampling=$P/downsample.yaml" "FastV=$P/fastv.yaml"
    "PyramidDrop=$P/pyramiddrop.yaml" "SparseVLM=$P/sparsevlm.yaml" "VisionZip=$P/visionzip.yaml"
    "PruMerge+=$P/prumerge_plus.yaml" "ToMe=$P/tome.yaml" "DivPrune=$P/divprune.yaml" "DART=$P/dart.yaml"
    "CDPruner=$P/cdpruner.yaml" "SCOPE=$P/scope.yaml" "TOPS=$P/tops.yaml" "ID-Selection=$P/id_selection.yaml"
    "ERA's bias=$P/era_bias.yaml" "all-question attention=$P/text_attention.yaml" "word similarity=$P/text_similarity.yaml"
    "DCP-Prune=$P/dcp.yaml" "DCP-Prune, proportional attention=$P/dcp_proportional.yaml"
    "DCP-Prune without ACGR=$without_acgr" "DCP-Prune without TATCS=$without_tatcs" "${originals[@]}"
    "RCP untrained=$rcp_topk" "Salient RCP untrained=$P/rcp_salient.yaml")
# row NAME FOLDER: a row of a plug-in, if it is there
row() {
    if [[ -f $2/plugin.json ]]; then
        methods+=("$1=$2")
    else
        note "no plug-in in $2, so no row $1"
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
    "Salient RCP, trained on one half of the skills=half_even" "Salient RCP, trained on the other half=half_odd" \
    "DivPrune, original positions, repaired=divprune_repair" "TOPS, original positions, repaired=tops_repair"; do
    row "${run%%=*}" "$RUNS/${run#*=}/seed_${SEEDS[0]:-0}/plugin"
done
[[ ! -d $RUNS/adaptive ]] || methods+=("Salient RCP, adaptive=$RUNS/adaptive/keep_{keep}")
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
