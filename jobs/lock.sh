#!/usr/bin/env bash
# Renew constraints.txt, the exact versions that the scripts install: the newest that pyproject.toml admits. Runs the tests
# on them and keeps the old file if one fails.
#   bash jobs/lock.sh                     about 15 minutes on two CPU cores
#   TORCH=2.14.1 bash jobs/lock.sh        another PyTorch than the one that is locked now
set -euo pipefail

locked=$(sed -n 's/^torch==//p' "$(dirname "${BASH_SOURCE[0]}")/../constraints.txt")
TORCH="${TORCH:-$locked}"
# The newest versions go into a fresh environment: what an old one holds must not decide.
CONSTRAINTS=$(mktemp)
echo "torch==$TORCH" >"$CONSTRAINTS"
fresh=$(mktemp -d)
trap 'rm -rf "$fresh" "$CONSTRAINTS"' EXIT
VENV="$fresh/venv"
# shellcheck source=jobs/install.sh
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"

# Left out: local labels (+cpu), the CUDA libraries that some builds of PyTorch bring and pin themselves, this project.
"$PY" -m pip freeze --all --exclude-editable --exclude lit-prune --exclude pip |
    grep -viE '^(nvidia-|cuda-|triton)' | grep -v ' @ ' | sed -E 's/\+[a-z0-9.]+$//' | LC_ALL=C sort -f >"$fresh/versions"
cp constraints.txt "$fresh/before"
{
    echo "# Exact versions of everything that the scripts in jobs/ install. Renewed and tested by jobs/lock.sh."
    cat "$fresh/versions"
} >constraints.txt
diff "$fresh/before" constraints.txt >&2 || true

if ! env -u CONSTRAINTS -u VENV bash jobs/test.sh; then
    cp "$fresh/before" constraints.txt
    note "the tests fail on the new versions: constraints.txt is as it was"
    exit 1
fi
note "constraints.txt is renewed; commit it"
