"""The headline: the S-IB head, forward and backward, naive and tuned and ours, interleaved in one run.

    python -m benchmarks.head --out benchmarks/results/<device>/head.json

Interleaved (naive, tuned, ours, naive, …) so that a drifting clock meets all of them, and reported as the median of the
ratios within a round. Peak memory: high-water mark of a fresh process per head, beyond its inputs. Linux only for memory.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.baselines import HEADS, forward_and_backward, natural_inputs
from benchmarks.provenance import ROOT, command_line, report


def seconds(name: str, vjp: torch.Tensor, x: torch.Tensor) -> float:
    start = time.perf_counter()
    forward_and_backward(name, vjp, x)
    return time.perf_counter() - start


def interleaved(images: int, channels: int, size: int, rounds: int) -> dict[str, list[float]]:
    vjp, x = natural_inputs(images, channels, size)
    for name in HEADS:
        seconds(name, vjp, x)
    return_: dict[str, list[float]] = {name: [] for name in HEADS}
    for _ in range(rounds):
        for name in HEADS:
            return_[name].append(seconds(name, vjp, x))
    return return_


def _status(field: str) -> int:
    return 1024 * int(re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE).group(1))


def peak_extra_bytes_here(name: str, images: int, channels: int, size: int) -> int:
    """Resident high-water mark of one forward and backward beyond what inputs and a small warm-up hold."""
    forward_and_backward(name, *natural_inputs(2, channels, 32))
    vjp, x = natural_inputs(images, channels, size)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = _status("VmRSS")
    forward_and_backward(name, vjp, x)
    return _status("VmHWM") - before


def peak_extra_bytes(name: str, images: int, channels: int, size: int) -> int:
    code = f"from benchmarks.head import peak_extra_bytes_here as p; print(p({name!r}, {images}, {channels}, {size}))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return int(result.stdout)


def measure(images: int, channels: int, size: int, rounds: int) -> dict:
    times = interleaved(images, channels, size, rounds)
    row = {
        "shape": [images, channels, size, size],
        "dtype": "float32",
        "rounds": rounds,
        "median_ms": {name: round(1e3 * statistics.median(t), 3) for name, t in times.items()},
        "min_ms": {name: round(1e3 * min(t), 3) for name, t in times.items()},
        "max_ms": {name: round(1e3 * max(t), 3) for name, t in times.items()},
    }
    for name in ("naive", "tuned"):
        ratios = [a / b for a, b in zip(times[name], times["ours"], strict=True)]
        row[f"speedup_over_{name}"] = {
            "median": round(statistics.median(ratios), 2), "min": round(min(ratios), 2), "max": round(max(ratios), 2)
        }  # fmt: skip
    row["peak_extra_mib"] = {name: round(peak_extra_bytes(name, images, channels, size) / 2**20, 1) for name in HEADS}
    row["peak_extra_of_naive"] = round(row["peak_extra_mib"]["ours"] / row["peak_extra_mib"]["naive"], 3)
    return row


SHAPES = [(16, 3, 224), (32, 3, 64), (64, 3, 32), (16, 256, 14)]


def main() -> None:
    args = command_line(__doc__, rounds=15).parse_args()
    for row in report(args, lambda: [measure(*shape, args.rounds) for shape in SHAPES]):
        print(row["shape"], row["median_ms"], "over naive", row["speedup_over_naive"], "over tuned", row["speedup_over_tuned"])
        print("   peak extra MiB", row["peak_extra_mib"], "ours/naive", row["peak_extra_of_naive"])


if __name__ == "__main__":
    main()
