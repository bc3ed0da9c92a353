#!/usr/bin/env bash
# Install if needed, check the style, run the tests, some files side by side. On a machine with a GPU its tests run too.
#   bash jobs/test.sh                     everything but the slow tests
#   bash jobs/test.sh -m slow             only those; -m versions: on other versions of the dependencies (network, an hour)
#   bash jobs/test.sh tests/test_cli.py -k help -x     arguments go to pytest
set -euo pipefail

# shellcheck source=jobs/install.sh
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"

# The tests' models are tiny: a second thread gains nothing, and waits where other jobs hold the cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export WANDB_MODE=offline HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

note "ruff"
ruff check .

marks="not slow and not gpu and not versions and not integrations"
spread=(-n logical --maxprocesses=4 --dist=loadfile --no-loadscope-reorder) # in the order of tests/conftest.py
if "$PY" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    marks="not slow and not versions and not integrations"
    spread=() # the memory of one GPU is for one process
fi
if (($#)); then
    spread=()
fi
note "pytest ($marks)"
exec "$PY" -m pytest -m "$marks" ${spread[@]+"${spread[@]}"} "$@"
