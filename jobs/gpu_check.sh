#!/usr/bin/env bash
# All that needs a GPU, in at most 8 minutes: tests marked gpu, times of LLaVA-1.5-7B's shape, steps of training.
#
#   bash jobs/gpu_check.sh [OUT]           on a machine with a CUDA device; nothing is downloaded
#   bash jobs/gpu_check.sh --smoke [OUT]   the same steps with small models on a CPU, in 2 minutes: do they run?
#
# OUT/summary.txt says which step ended how; a step that fails or runs out of time stops no other. The steps share 480 s;
# bench and training write what they have measured when their time is up. Ends with 1 if a step failed.
set -uo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
smoke=false
if [[ "${1:-}" == "--smoke" ]]; then
  smoke=true
  shift
fi
out=${1:-runs/gpu_check}
python=python
if [[ -x .venv/bin/python ]]; then
  python=$PWD/.venv/bin/python
fi
mkdir -p "$out"
: >"$out/summary.txt"
export HF_HUB_OFFLINE=1 WANDB_MODE=offline TOKENIZERS_PARALLELISM=false
failed=0

# step NAME SECONDS COMMAND...: output goes to OUT/NAME.log, its last line and how it ended to the summary.
step() {
  local name=$1 limit=$2 began=$SECONDS code=0
  shift 2
  echo "== $name: at most $limit s"
  timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1 || code=$?
  ((code == 0)) || failed=1
  printf '%-10s exit %-3s %4s s  %s\n' "$name" "$code" "$((SECONDS - began))" "$(tail -n 1 "$out/$name.log")" |
    tee -a "$out/summary.txt"
}

if $smoke; then
  shape=(configs/bench/cpu.yaml --batch-sizes 1 --new-tokens 2 --repeats 1 --warmup 0 --time-limit 60)
  training=(--model configs/bench/cpu.yaml --overlay configs/bench/pruners/rcp.yaml --keep 144 --dtype float32 --batch 1
    --rounds 1 --variants soft)
  step machine 30 "$python" -c 'import torch; print(torch.__version__, torch.get_num_threads(), "threads")'
  step tests 200 "$python" -m pytest -q -m gpu tests/test_backends.py # all skipped: there is no GPU
else
  shape=(configs/bench/gpu_7b.yaml --batch-sizes 1 8 32 --time-limit 170)
  training=(--rounds 3 --variants soft contenders drop)
  step machine 30 nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
  step tests 150 "$python" -m pytest -q -m gpu # flash attention, compiled layers, no synchronisation
fi
step bench 190 "$python" -m lit_prune bench -c "${shape[@]}" --json "$out/bench.json" --plot "$out/bench.png"
step training 110 "$python" jobs/train_speed.py "${training[@]}" --json "$out/training.json"
exit $failed
