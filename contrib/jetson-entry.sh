#!/bin/sh
# `build` makes the bundle's engines for this GPU, `serve` answers with them.
set -eu
case "${1:-serve}" in
    build) exec gap-runtime build /bundle ;;
    serve) exec gap-runtime serve /bundle --backend tensorrt --host 0.0.0.0 ;;
    *) exec gap-runtime "$@" ;;
esac
