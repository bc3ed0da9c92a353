# shellcheck shell=bash
# Sourced by the other scripts: answers --help with the caller's first comment, keeps runs offline unless told otherwise,
# goes to the repository's root, makes .venv and installs, unless that is up to date.
#   PYTHON=python3.12 bash jobs/...   uses another Python (3.11 or later)
#   CONSTRAINTS=                      installs without constraints.txt (another build of torch)
# Leaves $PY, the environment's Python, and puts its scripts first on PATH.

if [[ ${1-} == -h || ${1-} == --help ]]; then
    sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "$0"
    exit
fi

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
export WANDB_MODE="${WANDB_MODE:-offline}" WANDB_SILENT="${WANDB_SILENT:-true}" HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
export PIP_DISABLE_PIP_VERSION_CHECK=1

note() {
    local bold="" plain=""
    [[ ! -t 2 ]] || bold=$'\033[1m' plain=$'\033[0m'
    printf '%s== %s%s\n' "$bold" "$*" "$plain" >&2
}

PY=.venv/bin/python
STAMP=.venv/installed
CONSTRAINTS=${CONSTRAINTS-constraints.txt}

install() {
    local wanted
    wanted="$(cat pyproject.toml constraints.txt | cksum) ${CONSTRAINTS:-free}"
    if [[ -x $PY && -f $STAMP && "$(cat "$STAMP")" == "$wanted" ]]; then
        return
    fi
    note "installing into .venv (two minutes, 1.8 GB)"
    "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "error: Python 3.11 or later is needed; name one: PYTHON=python3.12 bash $0" >&2
        return 1
    }
    [[ -x $PY ]] || "${PYTHON:-python3}" -m venv .venv
    local pins=()
    [[ -z $CONSTRAINTS ]] || pins=(-c "$CONSTRAINTS")
    "$PY" -m pip install --quiet "${pins[@]}" torch # first: everything else takes the torch that is there
    "$PY" -m pip install --quiet "${pins[@]}" -e '.[dev]'
    printf '%s\n' "$wanted" >"$STAMP"
}

# Trains in a folder unless that has been done there; an interrupted run goes on.
#   fit_once FOLDER [options of fit]
fit_once() {
    local folder=$1
    shift
    [[ -f $folder/plugin/plugin.json ]] && return
    note "$folder"
    lit-prune fit -c configs/micro.yaml --trainer.default_root_dir="$folder" --ckpt_path last "$@"
}

install
export PATH="$PWD/.venv/bin:$PATH"
