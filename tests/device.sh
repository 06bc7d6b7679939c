#!/usr/bin/env bash
# The runtime alone, in an environment that holds gap-runtime, pytest and nothing of the exporter:
# with this Python, where it runs a bundle, or (`oldest`) with Python 3.10 where there is one.
set -euo pipefail
cd "$(dirname "$0")/.."

bundle=build/device/bundle
mkdir -p build/device
.venv/bin/gap-export refshapes --ratio 0.5 --out "$bundle" 2> build/device/export.log

find_python_3_10() {
    local candidate
    for candidate in python3.10 /usr/bin/python3.10 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.10*/bin/python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 10))' 2> /dev/null; then
            echo "$candidate"
            return
        fi
    done
}

# prepare PYTHON NAME: an environment with gap-runtime as a user installs it, from a wheel.
prepare() {
    local env="build/device/$2" stamp
    stamp="$env/.installed"
    if [ ! -f "$stamp" ] || [ -n "$(find runtime -newer "$stamp" \( -name '*.py' -o -name '*.toml' \) -print -quit)" ]; then
        rm -rf "$env"
        "$1" -m venv "$env"
        "$env/bin/python" -m pip install --quiet --disable-pip-version-check "./runtime[cpu]" pytest
        touch "$stamp"
    fi
    "$env/bin/python" -I - <<'PYTHON'
import importlib.util
import sys

found = [n for n in ("torch", "transformers", "onnx", "gap_export") if importlib.util.find_spec(n)]
sys.exit(f"not a clean environment: {found}" if found else 0)
PYTHON
    "$env/bin/pytest" --rootdir tests/runtime --confcutdir tests/runtime -c /dev/null --import-mode=importlib -q tests/runtime
}

if [ "${1:-this}" = this ]; then
    echo "== gap-runtime alone, $(.venv/bin/python --version)"
    prepare .venv/bin/python same
    build/device/same/bin/gap-runtime check "$bundle"
    exit 0
fi

python_3_10=$(find_python_3_10)
if [ -z "$python_3_10" ]; then
    echo "== no Python 3.10 here: not tried"
    exit 0
fi
echo "== gap-runtime alone, Python 3.10"
prepare "$python_3_10" python3.10
build/device/python3.10/bin/gap-runtime info "$bundle" > build/device/info.txt
# onnxruntime for Python 3.10 ends before opset 24: one clear line, exit code 5.
code=0
build/device/python3.10/bin/gap-runtime check "$bundle" 2> build/device/check.log || code=$?
if [ "$code" -ne 5 ] || ! grep -q "needs onnxruntime 1.24" build/device/check.log; then
    cat build/device/check.log
    exit 1
fi
