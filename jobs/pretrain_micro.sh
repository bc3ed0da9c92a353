#!/usr/bin/env bash
# Pretrains micro-LLaVA from scratch and measures it; about 45 minutes on two CPU cores.
#
#   bash jobs/pretrain_micro.sh [OUT]     the shipped recipe; an interrupted run continues with the same command
#   bash jobs/pretrain_micro.sh --smoke   a few steps of each stage in under a minute: does it run?
#
# Tolerance: on other machines and thread counts the sums are rounded differently, so weights differ. Expect the accuracy
# over all skills within 2 points of the card in lit_prune/micro/weights/README.md, and each skill within 5.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=python
if [[ -x .venv/bin/python ]]; then
  python=.venv/bin/python
fi

if [[ "${1:-}" == "--smoke" ]]; then
  out=$(mktemp -d)
  trap 'rm -rf "$out"' EXIT
  "$python" -m jobs.micro_llava.recipe --out "$out" --steps-vision 4 --steps 4
  "$python" -m jobs.micro_llava.evaluate --model "$out/model" --questions 14
  exit
fi

out=${1:-runs/pretrain_micro}
"$python" -m jobs.micro_llava.recipe --out "$out" --resume
"$python" -m jobs.micro_llava.evaluate --model "$out/model" --questions 700 --json "$out/table.json"
echo "The model is in $out/model; to ship it, put it and its card into lit_prune/micro/weights."
