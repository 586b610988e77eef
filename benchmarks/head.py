"""The headline: the S-IB head, forward and backward, against naive and tuned PyTorch, interleaved in one run.

    python -m benchmarks.head --out benchmarks/results/<device>/head.json                                  # the CPU
    python -m benchmarks.head --out … --device cuda --preset quick --precisions ieee tf32x3 tf32 --compiled

Reported per case and variant: median, spread and range of the device's time (CUDA-graph replay) and of the eager wall time,
ratios within a round, achieved bytes per second of SPEC 8's count and what share of the measured copy bandwidth that is, time
over the floor of each product mode, extra memory at the peak. Rows are written as they come.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import gate, timing
from benchmarks.baselines import HEADS, Head, forward_and_backward, heads_for, natural_inputs, usable_backends, value_and_gradient
from benchmarks.provenance import ROOT, command_line, provenance, write_json


class Case(NamedTuple):
    images: int
    channels: int
    size: int
    dtype: str = "float32"


BATCHES = (16, 32, 64, 97, 128, 160, 256, 512, 1024)
HEADLINE = Case(128, 3, 224)
PRESETS: dict[str, list[Case]] = {
    "smoke": [Case(4, 3, 32), Case(5, 8, 33, "bfloat16")],
    "cpu": [Case(16, 3, 224), Case(32, 3, 64), Case(64, 3, 32), Case(16, 256, 14)],
    "quick": [
        HEADLINE,
        HEADLINE._replace(dtype="bfloat16"),
        *(Case(n, 3, 224) for n in (64, 97, 256)),
        Case(64, 3, 32),
        Case(16, 3, 1024),
        Case(128, 256, 14),
    ],
    "full": [
        HEADLINE,
        HEADLINE._replace(dtype="bfloat16"),
        *(Case(n, 3, 224) for n in BATCHES if n != 128),
        *(Case(64, 3, size) for size in (32, 64, 128, 256, 512, 1024)),
        *(Case(n, 256, size) for n, size in ((32, 14), (128, 14), (1024, 14), (64, 28), (32, 56))),
        *(Case(n, 3, 224, "bfloat16") for n in (64, 256, 1024)),
        Case(128, 256, 14, "bfloat16"),
    ],
}


def _status(field: str) -> int:
    return 1024 * int(re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE).group(1))


def peak_extra_bytes_here(name: str, images: int, channels: int, size: int) -> int:
    """Resident high-water mark of one forward and backward beyond what inputs and a small warm-up hold. Linux only."""
    forward_and_backward(name, *natural_inputs(2, channels, 32))
    vjp, x = natural_inputs(images, channels, size)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = _status("VmRSS")
    forward_and_backward(name, vjp, x)
    return _status("VmHWM") - before


def peak_extra_bytes(name: str, images: int, channels: int, size: int) -> int:
    """The same in a process of its own: what an earlier variant freed would hide."""
    code = f"from benchmarks.head import peak_extra_bytes_here as p; print(p({name!r}, {images}, {channels}, {size}))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return int(result.stdout)


def _peak_mib(name: str, function: timing.Function, case: Case, device: torch.device) -> float | None:
    if device.type == "cuda":
        return round(timing.peak_extra_bytes(function, device) / 2**20, 1)
    if name in HEADS and case.dtype == "float32" and sys.platform.startswith("linux"):
        return round(peak_extra_bytes(name, case.images, case.channels, case.size) / 2**20, 1)
    return None


def measure(case: Case, device: torch.device, heads: dict[str, Head], rounds: int, ceilings: dict[str, float]) -> dict[str, Any]:
    """One row. heads must hold "naive"; a head that fails (no memory, no compiler) is in the row with its error."""
    vjp, x = natural_inputs(case.images, case.channels, case.size, getattr(torch, case.dtype), device)
    functions: dict[str, timing.Function] = {}
    row: dict[str, Any] = {
        "suite": "head",
        "case": case._asdict(),
        "device": device.type,
        # The product mode of the baselines, and of ours where its name says none.
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "variants": {},
        "floor_ms": timing.floors_ms(
            phases := timing.head_phases(case.images, case.channels, case.size, case.size, vjp.element_size()), ceilings
        ),
    }
    for name, head in heads.items():
        function = _bound(head, vjp, x)
        try:
            function()
            functions[name] = function
        except (RuntimeError, NotImplementedError) as error:  # torch.OutOfMemoryError is a RuntimeError
            row["variants"][name] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"}
    counted = sum(phase.bytes for phase in phases)
    times = timing.interleaved(functions, device, rounds)
    for name, one in times.items():
        device_ms = timing.summary(one.device)
        rate = counted / (device_ms["median"] / 1e3)
        row["variants"][name] = {
            "device_ms": device_ms,
            "eager_ms": timing.summary(one.eager),
            "graph": one.graph or ("replayed" if device.type == "cuda" else "no graphs on the CPU"),
            "gb_per_s": float(f"{rate / 1e9:.4g}"),
            "percent_of_copy": float(f"{100 * rate / ceilings['copy']:.4g}"),
            "over_floor": {mode: float(f"{device_ms['median'] / floor:.4g}") for mode, floor in row["floor_ms"].items()},
            "peak_extra_mib": _peak_mib(name, functions[name], case, device),
        }
    for slow in (name for name in times if not name.startswith("ours")):
        for fast in (name for name in times if name.startswith("ours")):
            row.setdefault("ratios", {}).setdefault(slow, {})[fast] = timing.ratios(times[slow].device, times[fast].device)
    return row


def _bound(head: Head, vjp: torch.Tensor, x: torch.Tensor) -> timing.Function:
    return lambda: value_and_gradient(head, vjp, x)


def arguments() -> argparse.ArgumentParser:
    parser = command_line(__doc__, rounds=15)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--preset", choices=sorted(PRESETS), help="default: cpu, or quick on cuda")
    parser.add_argument("--precisions", nargs="*", default=[], help="product modes of region_statistics: ieee tf32x3 tf32")
    parser.add_argument("--compiled", action="store_true", help="the baselines under torch.compile too, for the first case")
    parser.add_argument("--ceilings", type=Path, help="JSON with this machine's ceilings, instead of measuring them here")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no further case is begun")
    return parser


def main() -> None:
    args = arguments().parse_args()
    began = time.monotonic()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    backends = usable_backends(device)
    found = {} if args.skip_tests else gate.verdicts(backends, args.tests)
    green = backends if args.skip_tests else gate.require_green(found)
    small = {"copy": 2**24, "matmul": 256} if args.preset == "smoke" else {}
    ceilings = gate.read(args.ceilings)["ceilings"] if args.ceilings else timing.ceilings(device, **small)
    cases = PRESETS[args.preset or ("cpu" if args.device == "cpu" else "quick")]
    file = {
        "tests": "skipped" if args.skip_tests else found,
        **provenance(),
        "ceilings": ceilings,
        "not_measured": [],
        "rows": [],
    }
    for k, case in enumerate(cases):
        if time.monotonic() - began > args.budget:
            file["not_measured"].append(case._asdict())
            continue
        heads = heads_for(device, compiled=args.compiled and k == 0, precisions=tuple(args.precisions))
        # "auto" may choose any of the device's backends: it is timed only where all of them are green.
        red = [name for name in heads if any(name.startswith(f"ours_{b}") for b in backends if b not in green)]
        red += ["ours"] if len(green) < len(backends) else []
        row = measure(case, device, {name: h for name, h in heads.items() if name not in red}, args.rounds, ceilings)
        file["rows"].append(row)
        write_json(args.out, file)
        print(line_of(row), flush=True)
    write_json(args.out, file)


def line_of(row: dict[str, Any]) -> str:
    times = {name: one.get("device_ms", {}).get("median", "failed") for name, one in row["variants"].items()}
    over = {slow: {fast: r["median"] for fast, r in fasts.items()} for slow, fasts in row.get("ratios", {}).items()}
    return f"{list(row['case'].values())} ms {times}\n    ratios {over}\n    floors {row['floor_ms']}"


if __name__ == "__main__":
    main()
