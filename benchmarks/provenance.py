"""Where a figure comes from: machine, versions, commit. And the gate: nothing is timed on a red test run."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
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
    try:
        result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return ""
    return result.stdout.strip()


def commit() -> str:
    """Of this tree, with "-changed" where it differs from it. A copy without git is told by tools/gpu.py --prepare."""
    here = _git("rev-parse", "HEAD")
    if not here:
        told = ROOT / "build/gpu/commit"
        return told.read_text().strip() if told.is_file() else "unknown"
    changed = _git("status", "--porcelain", "--", "csrc", "sib_fast", "benchmarks/*.py", "CMakeLists.txt")
    return here + ("-changed" if changed else "")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def gpu() -> dict[str, Any] | None:
    """What torch and the driver say of the device, or None without one."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    try:
        driver = re.search(r"(\d+\.\d+(?:\.\d+)?)", Path("/proc/driver/nvidia/version").read_text())
        driver_version = driver.group(1) if driver else "unknown"
    except OSError:
        driver_version = "unknown"
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": round(properties.L2_cache_size / 2**20, 1),
        "driver": driver_version,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": _version("triton"),
        "count": torch.cuda.device_count(),
    }


def provenance() -> dict[str, Any]:
    return {
        "gpu": gpu(),
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
        "commit": commit(),
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
    parser.add_argument("--tests", type=Path, help="verdicts of `python -m benchmarks.gate`, instead of running the tests here")
    parser.add_argument("--skip-tests", action="store_true", help="for development; the file then says so")
    return parser


def report(args: argparse.Namespace, measure: Callable[[], Iterable[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Gate, measurement, file. Returns the rows. Where they come one by one each is stored at once: a run that is cut short has
    measured something."""
    torch.set_num_threads(args.threads)
    tests: Any = "skipped"
    if args.tests is not None:
        from benchmarks import gate  # which imports this module

        tests = gate.read(args.tests)["verdicts"]
        if gate.require_green(tests) != list(tests):
            sys.exit("benchmarks: the step runs whatever 'auto' chooses, so every backend must be green")
    elif not args.skip_tests:
        require_green_ops()
        tests = "green"
    rows, source = [], provenance()
    for row in measure():
        rows.append(row)
        write_json(args.out, {"tests": tests, **source, "rows": rows})
    return rows
