#!/usr/bin/env bash
# No script: sourced by those that test an integration in an environment of its own, runs/integrations/NAME by the script's
# name. Prints the script's first comment for --help, creates the environment, and sets `pip`, its quiet pip install.

if [[ ${1-} == -h || ${1-} == --help ]]; then
    sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "$0"
    exit
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
VENV="${VENV:-runs/integrations/$(basename "$0" .sh)}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" WANDB_MODE=offline HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
[[ -x $VENV/bin/python ]] || "${PYTHON:-python3}" -m venv "$VENV"
# shellcheck disable=SC2034 # read by the script that sources this one
pip=("$VENV/bin/python" -m pip install --quiet --no-compile)
