#!/usr/bin/env bash
# Test the range of versions that pyproject.toml promises: each leg in an environment of its own runs the equality battery,
# the model families, and a few steps of training, testing and comparing.
#   bash jobs/test_versions.sh                  oldest, newest, then transformers, lightning, jsonargparse, torch each alone
#                                               at its oldest beside the locked rest; about ten minutes a leg on two cores
#   bash jobs/test_versions.sh oldest newest    these legs: oldest, newest (every dependency at that end of its range),
#                                               PACKAGE-oldest, PACKAGE-newest, beyond (transformers newer than promised)
#   bash jobs/test_versions.sh 'transformers==5.20.2 torch==2.14.1'    a leg of your own; the rest as locked
#   bash jobs/test_versions.sh --newest-transformers    what CI runs: the newest release, if it isn't the locked one
#   PYTHON=python3.13 bash jobs/test_versions.sh locked
#   PIP_CONFIG_FILE=/dev/null bash jobs/test_versions.sh newest    where a configuration of pip's holds a package back
# Environments stay in runs/versions, so that a leg that failed can be looked at and is quick to repeat.
set -euo pipefail

if [[ ${1-} == -h || ${1-} == --help ]]; then
    sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "$0"
    exit
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON="${PYTHON:-python3}"
FOLDER="${FOLDER:-runs/versions}"
BATTERY=(tests/test_equality.py tests/test_families.py tests/test_loading.py)
mkdir -p "$FOLDER"

# Which releases a registry has can't be known without asking it.
newest_transformers() {
    "$PYTHON" -m pip index versions transformers 2>/dev/null | sed -n 's/^transformers (\(.*\))$/\1/p'
}

# One leg: its constraints, its environment, its tests. Prints the versions that it ran on.
leg() {
    local name=$1 folder
    folder="$FOLDER/$("$PYTHON" -c 'import sys; print("py%d.%d" % sys.version_info[:2])')-${name//[^A-Za-z0-9.=-]/_}"
    mkdir -p "$folder"
    "$PYTHON" jobs/constraints.py "$name" >"$folder/constraints.new" || return
    cmp -s "$folder/constraints.new" "$folder/constraints.txt" || rm -rf "$folder/venv"
    mv "$folder/constraints.new" "$folder/constraints.txt"
    export VENV="$folder/venv" CONSTRAINTS="$folder/constraints.txt" PYTHON
    rm -rf "$folder"/run*
    RUN="$folder/run" bash jobs/try.sh --smoke || return
    bash jobs/test.sh "${BATTERY[@]}" -q || return
    "$VENV/bin/python" -m pip list 2>/dev/null | grep -E '^(torch|transformers|lightning|jsonargparse|numpy) '
}

if [[ ${1-} == --newest-transformers ]]; then
    found=$(newest_transformers)
    if [[ -z $found ]]; then
        echo "the registry doesn't answer: nothing newer was tried"
    elif grep -qx "transformers==$found" constraints.txt; then
        echo "transformers $found is the newest release, and the locked one that all tests ran on"
    elif "$PYTHON" jobs/constraints.py --admits "transformers==$found"; then
        leg "transformers==$found"
    elif leg beyond; then
        echo "transformers $found is newer than promised and passes: raise the bound in pyproject.toml, run jobs/lock.sh"
    else
        echo "transformers $found is newer than promised and FAILS: the bound in pyproject.toml holds users back from it"
    fi
    exit
fi

(($#)) || set -- oldest newest transformers-oldest lightning-oldest jsonargparse-oldest torch-oldest
failed=()
for name in "$@"; do
    printf '== %s\n' "$name" >&2
    (leg "$name") || failed+=("$name")
done
if ((${#failed[@]})); then
    printf 'FAILED: %s\n' "${failed[@]}" >&2
    exit 1
fi
echo "passed: $*"
