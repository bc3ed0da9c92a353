# shellcheck shell=bash
# Sourced by the other scripts: answers --help with the caller's first comment, keeps runs offline unless told otherwise,
# goes to the repository's root, makes .venv and installs the exact versions of constraints.txt, unless that is up to date.
#   PYTHON=python3.12 bash jobs/...   another Python (3.11 to 3.13)
#   CONSTRAINTS= bash jobs/...        the newest versions that pyproject.toml admits instead of constraints.txt
#   TORCH_INDEX=URL bash jobs/...     PyTorch from this index; empty: from pip's own
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

VENV=${VENV:-.venv}
PY=$VENV/bin/python
STAMP=$VENV/installed
CONSTRAINTS=${CONSTRAINTS-constraints.txt}
CPU_INDEX=https://download.pytorch.org/whl/cpu

# PyPI's PyTorch for Linux carries CUDA: 5.6 GB installed. Without an NVIDIA GPU the CPU build does (1.8 GB in all), where
# pip finds one (a local wheel) or PyTorch's own index answers. Prints options for pip.
torch_source() {
    if [[ -n ${TORCH_INDEX+set} ]]; then
        printf '%s' "${TORCH_INDEX:+--index-url=$TORCH_INDEX}"
    elif [[ $(uname -s) == Linux ]] && ! command -v nvidia-smi >/dev/null && [[ ! -e /dev/nvidiactl ]]; then
        if "$PY" -c "import urllib.request as r; r.urlopen('$CPU_INDEX/torch/', timeout=5)" 2>/dev/null; then
            printf '%s' "--index-url=$CPU_INDEX"
        fi
    fi
}

# Installs with pip's own progress on a terminal, and quietly where output goes to a file. Of the 18,000 modules that come
# in, most are never imported; Python compiles the others when it first does.
pip_install() {
    local quiet=()
    [[ -t 1 ]] || quiet=(--quiet)
    "$PY" -m pip install --no-compile ${quiet[@]+"${quiet[@]}"} "$@"
}

# PyTorch goes first: everything else takes the build that is there.
install_all() {
    local source
    source=$(torch_source)
    if [[ -z $source ]]; then
        note "PyTorch from pip's index: with CUDA, 5.6 GB, unless pip finds a CPU build"
    else
        note "PyTorch from ${source#*=} (TORCH_INDEX= takes pip's own index)"
    fi
    pip_install "$@" ${source:+"$source"} torch && pip_install "$@" -e '.[dev]'
}

install() {
    local wanted
    wanted="$(cat pyproject.toml constraints.txt | cksum) ${CONSTRAINTS:-free}"
    if [[ -x $PY && -f $STAMP && "$(cat "$STAMP")" == "$wanted" ]]; then
        return
    fi
    note "installing into $VENV: 2 minutes and 1.8 GB with a CPU build of PyTorch, 6 minutes and 7 GB with CUDA"
    "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "error: Python 3.11 or later is needed; name one: PYTHON=python3.12 bash $0" >&2
        return 1
    }
    [[ -x $PY ]] || "${PYTHON:-python3}" -m venv "$VENV"
    if [[ -z $CONSTRAINTS ]]; then
        install_all
    elif ! install_all -c "$CONSTRAINTS"; then
        [[ $CONSTRAINTS == constraints.txt ]] || return 1 # somebody's own choice
        # Another platform may have no wheel of an exact version; that must not keep anybody from starting.
        note "the exact versions of $CONSTRAINTS can't be installed here: taking the newest that pyproject.toml admits"
        install_all
    fi
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
PATH="$(cd "$VENV/bin" && pwd):$PATH"
export PATH
