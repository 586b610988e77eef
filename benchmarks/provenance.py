"""Where a figure comes from: machine, versions, commit. And the gate: nothing is timed on a red test run."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import sib_fast
from sib_fast import _extension

ROOT = Path(__file__).parent.parent


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _git(*arguments: str) -> str:
    result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return result.stdout.strip()


def provenance() -> dict[str, Any]:
    changed = _git("status", "--porcelain", "--", "csrc", "sib_fast", "benchmarks/*.py", "CMakeLists.txt")
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average_1_min": round(os.getloadavg()[0], 2),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sib_fast": sib_fast.__version__,
        "build": _extension.BUILD_INFO,
        "capability": os.environ.get("SIB_FAST_CPU_CAPABILITY", "highest of this CPU"),
        "commit": _git("rev-parse", "HEAD") + ("-changed" if changed else ""),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def require_green_ops() -> None:
    """Runs the tests of the ops; exits with their output if one fails. A timing from a red run is not reported."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "tests/ops", "tests/test_benchmarks.py"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(f"benchmarks: the ops' tests are red, so nothing is timed\n{result.stdout[-3000:]}")


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Atomically, so that an interrupted run leaves the previous file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(data, indent=1) + "\n")
    partial.replace(path)


def command_line(description: str, rounds: int) -> argparse.ArgumentParser:
    """What every benchmark script asks: where to write, how many threads and rounds."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--skip-tests", action="store_true", help="for development; the file then says so")
    return parser


def report(args: argparse.Namespace, measure: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Gate, measurement, file. Returns the rows."""
    torch.set_num_threads(args.threads)
    if not args.skip_tests:
        require_green_ops()
    rows = measure()
    write_json(args.out, {"tests": "skipped" if args.skip_tests else "green", **provenance(), "rows": rows})
    return rows
