#!/usr/bin/env bash
# Build the wheel, install it into an environment of its own, and use it from an empty folder: no clone, no network.
#   bash jobs/wheel.sh                    about a minute; the wheel is left in dist/
#   PY=/path/to/python bash jobs/wheel.sh     dependencies of that Python in place of .venv's
# Dependencies are those of .venv (or PY), found by path, so nothing is downloaded; the clone itself is not on the path.
set -euo pipefail

if [[ -n ${PY-} ]]; then
    cd "$(dirname "${BASH_SOURCE[0]}")/.."
else
    # shellcheck source=jobs/install.sh
    source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
fi
unset PYTHONPATH
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INDEX=1 WANDB_MODE=offline WANDB_SILENT=true HF_HUB_OFFLINE=1
export TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
step() { printf '== %s (%d s)\n' "$*" "$SECONDS" >&2; }

# A copy is built: what `build/` holds of earlier builds would otherwise be packed too.
step "build"
mkdir -p "$work/source" "$work/empty" dist
cp -a pyproject.toml README.md LICENSE lit_prune configs "$work/source"
"$PY" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$work/wheel" "$work/source"
wheel=$(echo "$work"/wheel/*.whl)
cp "$wheel" dist/

step "install ${wheel##*/}"
"$PY" -m venv --without-pip "$work/venv"
"$PY" -m pip --python "$work/venv/bin/python" install --quiet --no-deps "$wheel"
# A line in a .pth file puts the folder on the path without reading the .pth files in it: an editable install stays out.
"$PY" -c 'import sysconfig; print(sysconfig.get_path("purelib")); print(sysconfig.get_path("platlib"))' |
    sort -u >"$(echo "$work"/venv/lib/python*/site-packages)/dependencies.pth"

cd "$work/empty"
PATH="$work/venv/bin:$PATH"
package=$(python -c 'import lit_prune, os; print(os.path.dirname(lit_prune.__file__))')
[[ $package == "$work"/venv/* ]] || {
    echo "error: not the wheel but $package was imported" >&2
    exit 1
}

step "version, configurations"
lit-prune --version
python -m lit_prune --help >/dev/null
lit-prune configs list pruners | grep '^pruners/fastv ' >/dev/null
lit-prune configs copy micro pruners/fastv --to copied >/dev/null
[[ -f copied/micro.yaml && -f copied/pruners/fastv.yaml ]]

step "sample, generate, show, fit"
lit-prune sample --out sample >/dev/null
# All verbs in one process: importing PyTorch and transformers takes longer than each of them.
python - >fit.log 2>&1 <<'END' || { cat fit.log && exit 1; }
from lit_prune.cli import main

asked = ["--image", "sample/0.png", "--prompt", "What colour is the tile?"]
main(["generate", *asked, "--pruner", "divprune", "--keep", "16", "--compare", "--json", "answers.json"])
main(["show", *asked, "--pruner", "fastv", "configs/pruners/divprune.yaml", "--keep", "16", "--out", "kept.png"])
data = [f"--data.init_args.{size}" for size in ("train_samples=14", "val_samples=7", "batch_size=4")]
main(["fit", "-c", "micro.yaml", "-c", "loggers/csv.yaml", "--trainer.max_steps=2", "--trainer.limit_val_batches=1", *data])
END
python -c 'import json; answers = json.load(open("answers.json"))["samples"][0]["methods"].values(); assert {a["answer"] for a in answers} == {"blue"}, answers'
[[ -s kept.png && -f runs/try/plugin/plugin.safetensors && -f runs/try/config_fit.yaml ]]

step "done: the wheel works without a clone"
