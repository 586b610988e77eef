"""Where a figure comes from: machine, versions, commit. And how a benchmark script stores its rows: one by one."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

import sib_fast
from benchmarks import gate
from benchmarks.baselines import usable_backends
from benchmarks.journal import DEVICE_LOST, DIED, ROOT, Journal
from sib_fast import _extension
from sib_fast.lab.results import write_atomically


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
    """Of this tree, with "-changed" where it differs from it. A copy without git is told by the bundle (tools/gpu.py)."""
    here = _git("rev-parse", "HEAD")
    if not here:
        stamp = ROOT / "build/gpu/stamp.json"
        return json.loads(stamp.read_text())["commit"] if stamp.is_file() else "unknown"
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


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Atomically, so that an interrupted run leaves the previous file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(data, indent=1) + "\n").encode())


def command_line(description: str, rounds: int) -> argparse.ArgumentParser:
    """What every benchmark script asks: where to write, how many threads and rounds."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the rows and where they come from, as JSON, rewritten after each row")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--journal", type=Path, help="lines of `python -m benchmarks.gate`, and of an earlier run to continue")
    parser.add_argument("--skip-tests", action="store_true", help="for development; the file then says so")
    return parser


class Item(NamedTuple):
    """A row to be measured. part_of: the item whose row takes its fields."""

    name: str
    measure: Callable[[], dict[str, Any]]
    part_of: str | None = None


def rows_of(lines: Iterable[dict[str, Any]], suite: str) -> list[dict[str, Any]]:
    """The rows that a suite's lines hold; what failed is one too, with the reason."""
    rows: dict[str, dict[str, Any]] = {}
    for line in lines:
        if line["suite"] == suite and line["state"] in ("done", *DIED):
            item, of = line["id"], line.get("part_of")
            ended = (
                line["row"] if line["state"] == "done" else {f"{item} failed" if of else "failed": line.get("why", line["state"])}
            )
            rows[of or item] = {**rows.get(of, {}), **ended} if of else {"item": item, **ended}
    return list(rows.values())


def file_of(lines: list[dict[str, Any]], suite: str, tests: Any, source: dict[str, Any]) -> dict[str, Any]:
    """What is stored under benchmarks/results: verdicts, machine, ceilings where some were measured, rows."""
    ceilings = next((line["row"] for line in reversed(lines) if line["id"] == "ceilings" and "row" in line), None)
    return {"tests": tests, **source, **({"ceilings": ceilings} if ceilings else {}), "rows": rows_of(lines, suite)}


def verdicts(args: argparse.Namespace, journal: Journal) -> dict[str, dict[str, Any]]:
    """Of the device's families: what the journal says; where it says nothing, the tests run now."""
    found = gate.verdicts(journal.lines())
    if found or journal.supervised or args.skip_tests:
        return found
    return gate.run(usable_backends(torch.device(getattr(args, "device", "cpu"))), journal)


def report(args: argparse.Namespace, suite: str, items: Callable[[Journal, dict], Iterable[Item]]) -> list[dict[str, Any]]:
    """Measures what is left of `items(journal, verdicts)`, a line for each at once. Returns the rows. One that fails (no memory,
    a compiler) costs the others nothing."""
    torch.set_num_threads(args.threads)
    journal, source = Journal.here(args.journal), provenance()
    found = verdicts(args, journal)
    for number, item in enumerate(items(journal, found)):
        if not journal.wants(suite, item.name, number):
            continue
        part = {"part_of": item.part_of} if item.part_of else {}
        journal.write(suite, item.name, "began", **part)
        try:
            state: dict[str, Any] = {"state": "done", "row": item.measure()}
        except Exception as error:  # no memory, a kernel or a region that does not compile, a device error
            state = {"state": "failed", "why": f"{type(error).__name__}: {str(error)[:500]}"}
        journal.write(suite, item.name, state.pop("state"), **part, **state)
        if args.out:
            write_json(args.out, file_of(journal.lines(), suite, "skipped" if args.skip_tests else found, source))
        if state.get("why") and torch.cuda.is_initialized():
            try:
                torch.cuda.synchronize()
            except RuntimeError:
                os._exit(DEVICE_LOST)  # whoever watches starts another process
    return rows_of(journal.lines(), suite)
