"""How results reach the disk, whole files replaced in one step, and what they say about where they came from."""

from __future__ import annotations

import dataclasses
import math
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that at every moment is either the old one or the new one, even if the process dies."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def remove_partials(folder: Path) -> None:
    """Remove what :func:`write_atomically` leaves of a process that was killed as it wrote."""
    for partial in folder.rglob(".*.partial"):
        partial.unlink(missing_ok=True)


def as_json(value: Any) -> Any:
    """A result as JSON can hold it: a dataclass is an object, a number that is not finite (a mean over nothing) is null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(k): as_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Interrupted(KeyboardInterrupt):
    """An interrupt whose text is the one sentence that the user needs: what is kept, and how to go on."""


def report_interrupt(command: str, error: KeyboardInterrupt) -> int:
    """What every command does about an interrupt: a sentence, no traceback. Returns the exit code."""
    kept = str(error) if isinstance(error, Interrupted) else "Nothing has been written; the same command starts again."
    if kept:
        print(f"sib-fast {command}: interrupted. {kept}", file=sys.stderr)
    return 130


def environment(threads: int, device: str, backend: str) -> dict[str, Any]:
    """Versions, machine, commit, and what the S-IB ops run on; strings and numbers only."""
    packages = ("torch", "lightning", "numpy", "scikit-image", "scikit-learn", "matplotlib")
    versions = {}
    for name in ("sib_fast", *packages):
        try:
            versions[name.replace("-", "_")] = version(name)
        except PackageNotFoundError:
            versions[name.replace("-", "_")] = None
    return versions | {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": _processor(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": threads,
        "backend": backend,
        "commit": commit(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def commit() -> str | None:
    """The commit of the source tree this module lies in, with -dirty for changes; None outside one."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        # an installed copy may lie in an environment inside somebody else's repository
        git("ls-files", "--error-unmatch", here.name)
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None
