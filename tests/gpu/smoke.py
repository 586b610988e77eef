"""One small parity check of every kernel family and op, in seconds: `python -m tests.gpu.smoke OUT.json cuda triton`.

Prints a line for each: the relative error of float32 against the reference in float64, or what went wrong. Exit status 1 if
anything did. The tests say more; this says first whether it is worth running them.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

from sib_fast import _backends
from tests.gpu.heads import inputs, steps

# Float32 against float64 at 6×3×40×33: rank flips move a window of the mask's gradient, so only gross errors show there.
BOUNDS = {"mask": 0.2, "statistics": 1e-3, "head": 0.3, "objective": 1e-6}
BOUNDS |= {"batch_norm": 1e-5, "activation": 1e-5, "softmax": 1e-5}
BOUNDS["layer_norm"] = 3e-5  # its rows of three channels: what is left of numbers that cancel


def check(backend: str, name: str) -> dict:
    reason = _backends.why_not(backend)
    if reason is None and _backends.KERNEL_DEVICES[backend] == "cuda" and not torch.cuda.is_available():
        reason = "torch sees no GPU"
    if reason is not None:
        return {"ok": None, "why": reason}
    torch.set_default_device(_backends.KERNEL_DEVICES[backend])
    try:
        made = inputs(6, 3, 40, 33)
        start = time.perf_counter()
        got = [t.double() for t in steps(backend)[name](*made, backend=backend)]
        seconds = time.perf_counter() - start
        want = steps(backend)[name](*(t.double() for t in made), backend="reference")
        errors = [((a - b).norm() / b.norm()).item() for a, b in zip(got, want, strict=True)]
    except Exception as error:  # a smoke test reports whatever happens
        return {"ok": False, "why": f"{type(error).__name__}: {str(error)[:500]}"}
    finally:
        torch.set_default_device(None)
    return {"ok": max(errors) <= BOUNDS[name], "errors": [float(f"{e:.2e}") for e in errors], "first_call_s": round(seconds, 2)}


def main(out: str, *backends: str) -> int:
    found = {f"{backend} {name}": check(backend, name) for backend in backends for name in steps(backend)}
    for what, one in found.items():
        print(f"{what}: {one}", flush=True)
    Path(out).write_text(json.dumps(found, indent=1))
    return 0 if all(one["ok"] for one in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
