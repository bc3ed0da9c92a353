#!/usr/bin/env bash
# Install lmms-eval beside this project into an environment of its own and test that its command answers as ours does.
#   bash jobs/lmms_eval.sh                8 GB and 10 minutes: lmms-eval needs torchvision, and brings much else
#   VENV=/elsewhere bash jobs/lmms_eval.sh
# The environment stays in runs/integrations/lmms_eval, for `lmms_eval --model lit_prune` by hand: docs/benchmarks.md.
set -euo pipefail

# shellcheck source=jobs/integration.sh
source "$(dirname "${BASH_SOURCE[0]}")/integration.sh"
# torchvision goes with one version of PyTorch: both are chosen together, before anything pins one of them.
"${pip[@]}" torch torchvision
"${pip[@]}" -e '.[train,lmms-eval]' pytest pytest-timeout hypothesis beartype
"$VENV/bin/python" -m pytest -m integrations tests/test_lmms_eval.py -q "$@"
