#!/usr/bin/env bash
# Pretrains micro-LLaVA with 576 visual tokens from scratch and measures its gates; some hours on two free CPU cores.
#
#   bash jobs/pretrain_micro_576.sh [OUT]     the recipe; an interrupted run continues with the same command
#   bash jobs/pretrain_micro_576.sh --smoke   two steps of each stage: does it run?
#
# OUT/log.csv has losses and, every 100 steps, accuracy by skill on held-out scenes, the background's cosine and the AUC
# of words. OUT/gates/gates.json has the gates. Ends with 1 if a gate is missed.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=python
if [[ -x .venv/bin/python ]]; then
  python=.venv/bin/python
fi
export OMP_NUM_THREADS=1 # two processes, a core each

if [[ "${1:-}" == "--smoke" ]]; then
  out=$(mktemp -d)
  trap 'rm -rf "$out"' EXIT
  "$python" -m jobs.micro_576.recipe --out "$out" --smoke --held-out 4
  "$python" jobs/micro_576/gates.py "$out/model" --scenes 1 || echo "an untrained model misses the gates, as it should"
  exit
fi

out=${1:-runs/pretrain_micro_576}
"$python" -m jobs.micro_576.recipe --out "$out"
"$python" jobs/micro_576/gates.py "$out/model"
echo "The model is in $out/model; to ship it, put it and its card into lit_prune/micro/weights_576."
