#!/usr/bin/env bash
# Install gradio beside this project into an environment of its own and test the demo in headless Chromium.
#   bash jobs/demo.sh                     2 GB and 5 minutes; Debian: apt-get install chromium chromium-driver first
#   VENV=/elsewhere bash jobs/demo.sh
# The environment stays in runs/integrations/demo. An extra of its own, since gradio holds Pillow below 13.
set -euo pipefail

if [[ ${1-} == -h || ${1-} == --help ]]; then
    sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "$0"
    exit
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV="${VENV:-runs/integrations/demo}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" WANDB_MODE=offline HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

[[ -x $VENV/bin/python ]] || "${PYTHON:-python3}" -m venv "$VENV"
# PyTorch first, as jobs/install.sh has it: everything else takes the build that is there.
torch=$(sed -n 's/^torch==/torch==/p' constraints.txt)
"$VENV/bin/python" -m pip install --quiet "$torch"
"$VENV/bin/python" -m pip install --quiet -e '.[demo]' selenium pytest pytest-timeout hypothesis beartype
"$VENV/bin/python" -m pytest -m integrations tests/test_demo.py -q "$@"
