"""The gate: a backend whose tests are red is not timed.

    python -m benchmarks.gate --out tests.json cpu cuda triton

runs each backend's tests and writes a verdict for each; the benchmarks read it (--tests) or run the tests themselves.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.provenance import ROOT, provenance, write_json

# Of tests/test_benchmarks.py those that compare the heads: one that computes something else is not timed either.
TESTS = ("tests/ops", "tests/test_benchmarks.py")


def verdict(backend: str, tests: tuple[str, ...] = TESTS, timeout: float | None = None, jobs: int = 1) -> dict[str, Any]:
    """{green, passed, failed, skipped, why, command}: green only if at least one test of the backend ran and none failed."""
    # Parameters stand in brackets, first or after another: test_opcheck[cuda], test_gradcheck[cuda-3].
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", f"{backend} or of_heads", *tests]
    parallel = ["-n", str(jobs)] if jobs > 1 and importlib.util.find_spec("xdist") else []
    try:
        result = subprocess.run([*command, *parallel], cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"green": False, "why": f"its tests took more than {timeout:.0f} s", "command": " ".join(command[1:])}
    count = {
        word: int(found.group(1)) if (found := re.search(rf"(\d+) {word}", result.stdout)) else 0
        for word in ("passed", "failed", "skipped", "error")
    }
    of_backend = _passed_of(backend, tests) if result.returncode == 0 else 0
    why = None
    if result.returncode not in (0, 5):  # 5: no test was left, as where the backend cannot run here
        red = re.findall(r"^(?:FAILED|ERROR) (\S+)", result.stdout, re.MULTILINE)
        why = f"red: {', '.join(red[:5]) or result.stdout[-300:] + result.stderr[-300:]}"
    elif of_backend == 0:
        why = "none of its tests ran here"
    return {"green": why is None, **count, "why": why, "command": " ".join(command[1:])}


def _passed_of(backend: str, tests: tuple[str, ...]) -> int:
    """1 where the backend can run here at all: with every one of its tests skipped, a green exit status says nothing."""
    code = (
        "import sys, torch\nfrom sib_fast import _backends as b\n"
        f"sys.exit(b.why_not({backend!r}) is not None or (b.KERNEL_DEVICES.get({backend!r}) == 'cuda' and not "
        "torch.cuda.is_available()))"
    )
    return int(subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0)


def read(path: Path) -> dict[str, Any]:
    """A file of this project's, refused where it was written at another commit: its figures would not be this code's."""
    stored, here = json.loads(path.read_text()), provenance()["commit"]
    if stored["commit"] != here:
        sys.exit(f"benchmarks: {path} is of commit {stored['commit']}, this is {here}")
    return stored


def verdicts(backends: list[str], path: Path | None = None) -> dict[str, dict[str, Any]]:
    """A verdict for each backend, from `path` where it was written at this commit, otherwise by running the tests."""
    if path is not None:
        stored = read(path)["verdicts"]
        return {name: stored.get(name, {"green": False, "why": f"not in {path}"}) for name in backends}
    return {name: verdict(name) for name in backends}


def require_green(found: dict[str, dict[str, Any]]) -> list[str]:
    """The green backends; what is left out is said. Exits where none is left."""
    for name, one in found.items():
        if not one["green"]:
            print(f"benchmarks: {name} is not timed: {one['why']}", file=sys.stderr)
    green = [name for name, one in found.items() if one["green"]]
    if not green:
        sys.exit("benchmarks: no backend's tests are green here, so nothing is timed")
    return green


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--timeout", type=float, help="seconds a backend; over it counts as red")
    parser.add_argument("--jobs", type=int, default=1, help="processes, where pytest-xdist is")
    parser.add_argument("backends", nargs="+")
    args = parser.parse_args()
    found = {}
    for name in args.backends:
        found[name] = one = verdict(name, TESTS, args.timeout, args.jobs)
        write_json(args.out, {**provenance(), "verdicts": found})
        print(f"{name}: {'green' if one['green'] else one['why']} ({one.get('passed', 0)} passed)", flush=True)
    return 0 if all(one["green"] for one in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
