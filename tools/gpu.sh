#!/usr/bin/env bash
# `make gpu`: everything that needs a GPU, on the machine that has one and no network (docs/benchmarks.md).
# Finds the python that holds torch and one that sees the GPU before any other; this project's .venv comes last.
set -euo pipefail
cd "$(dirname "$0")/.."
chosen=""
for python in ${PYTHON:-} python3 python .venv/bin/python; do
  if command -v "$python" >/dev/null && "$python" -c 'import torch' 2>/dev/null; then
    chosen="${chosen:-$python}"
    if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
      chosen="$python"
      break
    fi
  fi
done
[ -n "$chosen" ] || { echo "gpu.sh: no python with torch: set PYTHON" >&2; exit 1; }
exec "$chosen" -u tools/gpu.py "$@"
