"""The headline: the S-IB head, forward and backward, against naive and tuned PyTorch, interleaved in one run.

    python -m benchmarks.head --out benchmarks/results/<device>/head.json                                  # the CPU
    python -m benchmarks.head --out … --device cuda --preset quick --precisions ieee tf32x3 tf32 --compiled

Reported per case and variant: median, spread and range of the device's time (CUDA-graph replay) and of the eager wall time,
ratios within a round, achieved bytes per second of SPEC 8's count and what share of the measured copy bandwidth that is, time
over the floor of each product mode, extra memory at the peak, the gradient's cosine to naive's. Rows are stored as they come.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import gate, timing
from benchmarks.baselines import HEADS, Head, forward_and_backward, heads_for, natural_inputs, value_and_gradient
from benchmarks.journal import ROOT, Journal, attempts
from benchmarks.provenance import Item, command_line, report


class Case(NamedTuple):
    images: int
    channels: int
    size: int
    dtype: str = "float32"

    def __str__(self) -> str:
        return "×".join(map(str, self))


BATCHES = (16, 32, 64, 97, 128, 160, 256, 512, 1024)
HEADLINE = Case(128, 3, 224)
PRESETS: dict[str, list[Case]] = {
    "smoke": [Case(4, 3, 32), Case(5, 8, 33, "bfloat16")],
    "headline": [HEADLINE],
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


AGREE = 0.9  # cosine to naive's gradient, below which a head computes something else: equal values ranked otherwise leave 0.97


def measure(case: Case, device: torch.device, heads: dict[str, Head], rounds: int, ceilings: dict[str, float]) -> dict[str, Any]:
    """One row. The first head is "naive"; one that fails (no memory, no compiler) or disagrees is in it with its error."""
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
    wanted, cosines = None, {}
    for name, head in heads.items():
        function = _bound(head, vjp, x)
        try:
            gradient = function()[1].flatten().double()
            wanted = gradient if name == "naive" else wanted
            cosines[name] = None if wanted is None else round((gradient @ wanted / (gradient.norm() * wanted.norm())).item(), 6)
            if wanted is not None and not cosines[name] >= AGREE:
                raise RuntimeError(f"its gradient is not naive's: cosine {cosines[name]}")
            functions[name] = function
        except Exception as error:  # no memory, a kernel that does not compile
            if device.type == "cuda":
                torch.cuda.synchronize()  # raises where the device is lost, which is no error of the variants after this one
            row["variants"][name] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"}
    wanted = gradient = None  # their memory
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
            "cosine_to_naive": cosines[name],
            "needs": needs_of(name, device),
        }
    for slow in (name for name in times if not name.startswith("ours")):
        for fast in (name for name in times if name.startswith("ours")):
            row.setdefault("ratios", {}).setdefault(slow, {})[fast] = timing.ratios(times[slow].device, times[fast].device)
    return row


def _bound(head: Head, vjp: torch.Tensor, x: torch.Tensor) -> timing.Function:
    return lambda: value_and_gradient(head, vjp, x)


def needs_of(name: str, device: torch.device) -> list[str]:
    """The verdicts behind a head's figure; the baselines need none."""
    backend = [*name.split("_"), "auto"][1]
    return gate.needs_of_head(backend, device) if name.startswith("ours") else []


def arguments() -> argparse.ArgumentParser:
    parser = command_line(__doc__, rounds=15)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--preset", choices=sorted(PRESETS), help="default: cpu, or quick on cuda")
    parser.add_argument("--precisions", nargs="*", default=[], help="product modes of region_statistics: ieee tf32x3 tf32")
    parser.add_argument("--compiled", action="store_true", help="last, the baselines under torch.compile too, for the first case")
    parser.add_argument("--warm", action="store_true", help="time nothing: run each Triton head once, so that it is compiled")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = arguments().parse_args(argv)
    device = torch.device(args.device)
    cases = PRESETS[args.preset or ("cpu" if args.device == "cpu" else "quick")]

    def items(journal: Journal, found: dict[str, dict]) -> Iterator[Item]:
        heads = heads_for(device, compiled=args.compiled, precisions=tuple(args.precisions))
        red = {name: why for name in heads if (why := gate.red(found, needs_of(name, device)))}
        good = [name for name in heads if name not in red]
        if args.warm:
            names = [name for name in good if name.startswith("ours_triton")]
            yield from (
                Item(f"{case} {name}", lambda c=case, h=heads[name]: _once(h, c, device)) for case in cases for name in names
            )
            return
        small = {"copy": 2**24, "matmul": 256} if args.preset == "smoke" else {}
        ceilings = journal.row("machine", "ceilings") or timing.ceilings(device, **small)
        if journal.row("machine", "ceilings") is None:
            journal.write("machine", "ceilings", "done", row=ceilings)
        compiled = tuple(name for name in good if name.endswith("_compiled"))
        plans = [(case, str(case), tuple(name for name in good if name not in compiled)) for case in cases]
        if compiled:
            plans.append((cases[0], f"{cases[0]} compiled", ("naive", *(name for name in ("ours",) if name in good), *compiled)))
        for case, name, variants in plans:
            base = ("naive", "tuned") if not set(variants) & set(compiled) else ("naive",)
            for item, chosen in attempts(journal, "head", name, variants, base):
                yield Item(item, lambda c=case, v=chosen: {**_measure(c, v, heads, ceilings), "left_out": red})

    def _measure(case: Case, variants: tuple[str, ...], heads: dict[str, Head], ceilings: dict[str, float]) -> dict[str, Any]:
        row = measure(case, device, {name: heads[name] for name in variants}, args.rounds, ceilings)
        print(line_of(row), flush=True)
        return row

    report(args, "warm" if args.warm else "head", items)


def _once(head: Head, case: Case, device: torch.device) -> dict[str, float]:
    start = time.perf_counter()
    value_and_gradient(head, *natural_inputs(case.images, case.channels, case.size, getattr(torch, case.dtype), device))
    return {"seconds": round(time.perf_counter() - start, 2)}


def line_of(row: dict[str, Any]) -> str:
    times = {name: one.get("device_ms", {}).get("median", "failed") for name, one in row["variants"].items()}
    over = {slow: {fast: r["median"] for fast, r in fasts.items()} for slow, fasts in row.get("ratios", {}).items()}
    return f"{list(row['case'].values())} ms {times}\n    ratios {over}\n    floors {row['floor_ms']}"


if __name__ == "__main__":
    main()
