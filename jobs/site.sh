#!/usr/bin/env bash
# Build the documentation site from docs/, the other Markdown pages and the docstrings; a broken link or anchor fails it.
#   bash jobs/site.sh                     written to build/site; open index.html there (search needs a server)
#   bash jobs/site.sh --serve             serve it on http://127.0.0.1:8000 and rebuild when a page changes
# Uses .venv (or VENV) if mkdocs is installed there, and otherwise build/site-venv: 200 MB, without PyTorch, since docstrings
# are read and not imported. A minute with that install.
set -euo pipefail

if [[ ${1-} == -h || ${1-} == --help ]]; then
    sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "$0"
    exit
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1 NO_MKDOCS_2_WARNING=true

VENV=${VENV:-.venv}
if [[ ! -x $VENV/bin/mkdocs ]]; then
    VENV=build/site-venv
    wanted=$(cat pyproject.toml constraints.txt | cksum)
    if [[ "$(cat "$VENV/installed" 2>/dev/null)" != "$wanted" ]]; then
        "${PYTHON:-python3}" -m venv "$VENV"
        "$VENV/bin/python" -c '
import tomllib
print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")
' >"$VENV/requirements.txt"
        "$VENV/bin/python" -m pip install --quiet -c constraints.txt -r "$VENV/requirements.txt"
        printf '%s' "$wanted" >"$VENV/installed"
    fi
fi

if [[ ${1-} == --serve ]]; then
    exec "$VENV/bin/mkdocs" serve
fi
# Not --quiet: with it mkdocs counts no warnings, and --strict passes everything.
"$VENV/bin/mkdocs" build --strict --clean
echo "written: build/site/index.html"
