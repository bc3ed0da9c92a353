#!/usr/bin/env bash
# Install lmms-eval beside this project into an environment of its own and test that its command answers as ours does.
#   bash jobs/lmms_eval.sh                8 GB and 10 minutes: lmms-eval needs torchvision, and brings much else
#   VENV=/elsewhere bash jobs/lmms_eval.sh
# The environment stays in runs/integrations/lmms_eval, for `lmms_eval --model lit_prune` by hand: docs/benchmarks.md.
set -euo pipefail

if [[ ${1-} == -h || ${1-} == --help ]]; then
    sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "$0"
    exit
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV="${VENV:-runs/integrations/lmms_eval}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" WANDB_MODE=offline HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

[[ -x $VENV/bin/python ]] || "${PYTHON:-python3}" -m venv "$VENV"
# torchvision goes with one version of PyTorch: both are chosen together, before anything pins one of them.
"$VENV/bin/python" -m pip install --quiet torch torchvision
"$VENV/bin/python" -m pip install --quiet -e '.[lmms-eval]' pytest pytest-timeout hypothesis beartype
"$VENV/bin/python" -m pytest -m integrations tests/test_lmms_eval.py -q "$@"
