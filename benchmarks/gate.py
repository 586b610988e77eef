"""The gate: a figure counts where the tests of every op behind it are green, by kernel family, op and direction.

    python -m benchmarks.gate --journal tests.jsonl cpu

A verdict is computed from the tests' own lines (benchmarks/journal.py): red where one failed or crashed; green where all of them
ran; otherwise not judged, which is no statement about the op: time ran out, or a run was cut. What is red is not timed. What is
not judged is timed, and its figures are reported once its tests have run (benchmarks/stored.py).
"""

from __future__ import annotations

import argparse
import collections
import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import sib_fast
from benchmarks.journal import ROOT, Journal, states
from sib_fast import _backends

# Of tests/test_benchmarks.py those that compare the heads: one that computes something else is not timed either.
TESTS = ("tests/ops", "tests/test_benchmarks.py")
SUITE = "tests"
HEAD = ("foreground_mask", "region_statistics", "hsic_objective")
FAMILIES = sib_fast.BACKENDS[1:]
OPS = (*HEAD, "batch_norm", "layer_norm", "softmax", "activation", "head")
DIRECTIONS = ("forward", "backward")
# Tests that say nothing about a forward pass; any other one that fails condemns both directions.
BACKWARD_ALONE = re.compile(
    "gradcheck|gradients_keep|only_the_gradients|no_gradient|(second|third)_derivative|double_backward|backward_twice|cotangents"
)


def _module(op: str) -> ModuleType:
    return importlib.import_module(f"sib_fast.ops.{op}")


def key(family: str, op: str, direction: str) -> str:
    return f"{family} {op} {direction}"


def keys_of(path: str, name: str, parameters: dict[str, Any]) -> list[str]:
    """The verdicts that a test is evidence for; none of a test that asks for no kernel."""
    stem, family = Path(path).stem.removeprefix("test_"), parameters.get("kernel", parameters.get("backend"))
    op = parameters.get("op") or next((op for op in OPS if stem.startswith(op) or name == f"test_{op}"), None)
    if "of_heads" in name:
        op, family = "head", str(parameters.get("name", "")).removeprefix("ours_")
    if op not in OPS or family not in FAMILIES or (op != "head" and family not in _module(op).KERNELS):
        return []
    alone = DIRECTIONS[1:] if BACKWARD_ALONE.search(name) else DIRECTIONS
    directions = [parameters["direction"]] if "direction" in parameters else alone
    return [key(family, op, direction) for direction in directions]


def verdicts(lines: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """{key: {state, green, passed, failed, skipped, of, why}} of every key that a test was collected for."""
    lines = [line for line in lines if line["suite"] == SUITE]
    last = states(lines, SUITE)
    keys = {line["id"]: line["keys"] for line in lines if line.get("keys")}
    of: dict[str, int] = {}
    for line in lines:
        # Some call collects a part first (parity), a later one all.
        for name, count in line.get("counts", {}).items():
            of[name] = max(of.get(name, 0), count)
    whole = any(line.get("whole") for line in lines)
    found = {}
    for name in of:
        count = collections.Counter(last[item] for item in last if name in keys.get(item, ()))
        red = [item for item in last if name in keys.get(item, ()) and last[item] in ("failed", "crashed")]
        ran = count["passed"] + count["skipped"]
        if red:
            state, why = "red", f"red: {', '.join(red[:5])}"
        elif whole and ran >= of[name] and count["passed"] > 0:
            state, why = "green", None
        elif ran >= of[name] and count["passed"] == 0:
            state, why = "not judged", "none of its tests ran here"
        else:
            state, why = "not judged", f"{ran} of {of[name]} tests ran{'' if whole else ' of those that were begun with'}"
        failed = count["failed"] + count["crashed"]
        counts = {"passed": count["passed"], "failed": failed, "skipped": count["skipped"], "of": of[name]}
        found[name] = {"state": state, "green": state == "green", **counts, "why": why}
    return found


def command(families: Iterable[str], *tests: str) -> list[str]:
    return [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "benchmarks.streaming", "--tb=short",
        "--whole", f"--families={','.join(families)}", *(tests or TESTS),
    ]  # fmt: skip


def run(families: Iterable[str], journal: Journal, tests: tuple[str, ...] = TESTS) -> dict[str, dict[str, Any]]:
    """Runs the families' tests here; their verdicts."""
    with tempfile.TemporaryDirectory() as folder:
        path = (*journal.paths, Path(folder) / "tests.jsonl")[0]
        environment = {**os.environ, "SIB_FAST_JOURNAL": str(path)}
        result = subprocess.run(command(families, *tests), cwd=ROOT, capture_output=True, text=True, env=environment)
        found = verdicts(Journal(path).lines())
    if not found:
        sys.exit(f"benchmarks: no test could be collected\n{result.stdout[-2000:]}{result.stderr[-1000:]}")
    return found


def of_device(device: torch.device | str) -> list[str]:
    """The kernel families that run on a device, usable or not."""
    return [name for name in FAMILIES if _backends.KERNEL_DEVICES[name] == torch.device(device).type]


# ---- what a figure needs ----------------------------------------------------------------------------------------------------


def needs(pairs: Iterable[tuple[str, str]], directions: Iterable[str] = DIRECTIONS) -> list[str]:
    """The verdicts behind a figure, from (family, op); the reference and PyTorch's own ops need none."""
    kernels = [pair for pair in pairs if pair[0] in _backends.KERNEL_DEVICES]
    return [key(family, op, direction) for family, op in kernels for direction in directions]


def families(backend: str, ops: Iterable[str], device: torch.device | str) -> list[tuple[str, str]]:
    """(family, op): what `backend` runs each op on; "auto" asks the op."""
    if backend != "auto":
        return [(backend, op) for op in ops]
    return [(_backends.automatic(torch.device(device), _module(op).KERNELS), op) for op in ops]


def needs_of_head(backend: str, device: torch.device | str) -> list[str]:
    whole = [] if backend == "auto" else [(backend, "head")]
    return needs([*families(backend, HEAD, device), *whole])


def red(found: dict[str, dict[str, Any]], wanted: Iterable[str]) -> list[str]:
    """The red ones of the verdicts that a figure needs: it is not taken."""
    return [name for name in wanted if found.get(name, {}).get("state") == "red"]


def loss_backend(found: dict[str, dict[str, Any]], device: torch.device | str) -> str | None:
    """What the loss is timed with: what "auto" chooses, or a family where that is red; None where every one is."""
    usable = [name for name in of_device(device) if _backends.why_not(name) is None]
    return next((name for name in ("auto", *usable) if not red(found, needs_of_head(name, device))), None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--journal", type=Path, required=True)
    parser.add_argument("families", nargs="+")
    args = parser.parse_args()
    found = run(args.families, Journal(args.journal))
    for name, one in found.items():
        print(f"{name}: {one['why'] or 'green'} ({one['passed']} passed)", flush=True)
    return 0 if all(one["green"] for one in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
