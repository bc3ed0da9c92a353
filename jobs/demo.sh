#!/usr/bin/env bash
# Install gradio beside this project into an environment of its own and test the demo in headless Chromium.
#   bash jobs/demo.sh                     2 GB and 5 minutes; needs Chromium: apt-get install chromium
#   VENV=/elsewhere bash jobs/demo.sh
# The environment stays in runs/integrations/demo. An extra of its own, since gradio holds Pillow below 13.
set -euo pipefail

# shellcheck source=jobs/integration.sh
source "$(dirname "${BASH_SOURCE[0]}")/integration.sh"
# PyTorch first, as jobs/install.sh has it: everything else takes the build that is there.
torch=$(sed -n 's/^torch==/torch==/p' constraints.txt)
"${pip[@]}" "$torch"
"${pip[@]}" -e '.[train,demo]' playwright pytest pytest-timeout hypothesis beartype
"$VENV/bin/python" -m pytest -m integrations tests/test_demo.py -q "$@"
