"""What a run produces, and how it reaches the disk: whole files only, replaced in one step."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import platform
import subprocess
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class NetworkResult:
    """One trained network.

    Attributes:
        method: ``"plain"`` or ``"sib"``.
        accuracy_in_distribution, accuracy_shifted: on the test digits, backgrounds correlated as in training or not.
        inside_share_in_distribution, inside_share: mean over test images (the latter on shifted backgrounds) of the
            share of the absolute input gradient that lies inside the object; images with a zero gradient left out.
        zero_gradients: how many of the shifted test images were left out for that reason.
        mask_area: mean share of the shifted test images that the object covers: what a uniform map would score.
        steps, train_seconds: optimiser steps, and the wall-clock time that they took with logging and progress bar.
        terms: means over the last epoch of everything the criterion reports.
        weights, log: paths relative to the output folder.
    """

    method: str
    seed: int
    accuracy_in_distribution: float
    accuracy_shifted: float
    inside_share_in_distribution: float
    inside_share: float
    zero_gradients: int
    mask_area: float
    steps: int
    train_seconds: float
    terms: dict[str, float]
    weights: str
    log: str


@dataclass
class Results:
    """A run: its settings, where it ran, every network, and the step times.

    Attributes:
        status: ``"running"``, ``"interrupted"`` or ``"complete"``.
        step_seconds: median seconds of a training step per method: ``plain``, ``naive`` (S-IB in plain PyTorch),
            ``sib``; empty until measured.
        panel: path of the picture relative to ``out``, or None.
    """

    out: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    status: str = "running"
    networks: list[NetworkResult] = field(default_factory=list)
    step_seconds: dict[str, float] = field(default_factory=dict)
    panel: str | None = None

    def network(self, method: str, seed: int) -> NetworkResult | None:
        return next((n for n in self.networks if (n.method, n.seed) == (method, seed)), None)

    def values(self, method: str, quantity: str) -> list[float]:
        """One number per network of a method, in the order of the seeds."""
        chosen = sorted((n for n in self.networks if n.method == method), key=lambda n: n.seed)
        return [getattr(n, quantity) for n in chosen]

    def save(self) -> None:
        """Write results.json and results.csv, each replaced in one step."""
        document = {k: v for k, v in dataclasses.asdict(self).items() if k != "out"}
        write_atomically(self.out / "results.json", (json.dumps(document, indent=2) + "\n").encode())
        write_atomically(self.out / "results.csv", self._csv().encode())

    def _csv(self) -> str:
        shared = (
            {f"step_seconds_{k}": v for k, v in self.step_seconds.items()}
            | {f"config_{k}": _cell(v) for k, v in self.config.items()}
            | {f"environment_{k}": _cell(v) for k, v in self.environment.items()}
        )
        rows = []
        for network in self.networks:
            row = dataclasses.asdict(network)
            terms = row.pop("terms")
            rows.append(row | {f"term_{k}": v for k, v in terms.items()} | shared)
        text = io.StringIO()
        # plain networks report fewer terms than S-IB ones
        columns = list(dict.fromkeys(key for row in rows for key in row))
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    @classmethod
    def load(cls, out: Path) -> Results:
        """Read results.json. Errors: FileNotFoundError, ValueError if the file is not one of ours."""
        try:
            document = json.loads((out / "results.json").read_text())
            document["networks"] = [NetworkResult(**n) for n in document["networks"]]
            return cls(out=out, **document)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"results: {out / 'results.json'} must be written by this version, got {error}") from error


def _cell(value: Any) -> Any:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else value


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that at every moment is either the old one or the new one, even if the process dies."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


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
