#!/usr/bin/env bash
# What is given to people: an sdist and a wheel of each distribution, the wheel made from the sdist,
# checked, and installed where nothing else is; then the commands run there, far from these files.
set -euo pipefail
cd "$(dirname "$0")/.."
top=$PWD dist=$PWD/build/dist

rm -rf "$dist"
mkdir -p "$dist"
for project in runtime .; do
    .venv/bin/python -m build --outdir "$dist" "$project" > "$dist.log" 2>&1 || { tail -20 "$dist.log"; exit 1; }
done
.venv/bin/python -m twine check --strict "$dist"/*
.venv/bin/python tests/tools/dist_files.py "$dist"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

# install NAME WHEEL: an empty environment with that wheel and what it needs.
install() {
    "$top/.venv/bin/python" -m venv "$1"
    "$1/bin/python" -m pip install --quiet --disable-pip-version-check --find-links "$dist" "$2"
}

install device "gap-runtime[cpu] @ file://$(echo "$dist"/gap_runtime-*.whl)"
install export "gap-export @ file://$(echo "$dist"/gap_export-*.whl)"
export/bin/gap-export list > list.txt
export/bin/gap-export refshapes-256 --ratio 0.75 --no-reference --out bundle 2> export.log || { cat export.log; exit 1; }
device/bin/gap-runtime ground bundle "$top/refshapes/samples-256/test-027.png" "the triangle below the cross"
(cd "$dist" && ls -l -- *.whl *.tar.gz)
