#!/usr/bin/env bash
# `make gpu`: everything that needs a GPU, on the machine that has one and no network (docs/benchmarks.md).
# Finds the python that holds torch and one that sees the GPU before any other; this project's .venv comes last.
set -euo pipefail
cd "$(dirname "$0")/.."
chosen=""
for python in ${PYTHON:-} python3 python .venv/bin/python; do
  command -v "$python" >/dev/null || continue
  case "$("$python" -c 'import torch; print("GPU" if torch.cuda.is_available() else "torch")' 2>/dev/null)" in
    GPU) chosen="$python" && break ;;
    torch) chosen="${chosen:-$python}" ;;
  esac
done
[ -n "$chosen" ] || { echo "gpu.sh: no python with torch: set PYTHON" >&2; exit 1; }
exec "$chosen" -u tools/gpu.py "$@"
