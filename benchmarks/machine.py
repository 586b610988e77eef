"""What the machine can do, and where naive's time goes: `python -m benchmarks.machine --out ceilings.json [--device cuda]`.

ceilings       copy bandwidth, float32, tf32 and bf16 matrix rates (benchmarks/timing.py)
chain_error    relative error of a tensor-core product against float64 for chains of K products in one accumulator, by mode
naive_by_op    the naive head at the headline's size, forward and backward: device time of every kernel, largest first
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks import timing
from benchmarks.baselines import naive_head, natural_inputs, value_and_gradient
from benchmarks.provenance import Item, command_line, report

CHAINS = (96, 384, 512, 1536, 4608, 18432)


def _dot_kernel():
    import triton
    import triton.language as tl

    @triton.jit
    def dot(a, b, out, K, MODE: tl.constexpr, SIZE: tl.constexpr, STEP: tl.constexpr):
        row, column, k = tl.arange(0, SIZE), tl.arange(0, SIZE), tl.arange(0, STEP)
        total = tl.zeros((SIZE, SIZE), dtype=tl.float32)
        for first in range(0, K, STEP):
            left = tl.load(a + row[:, None] * K + first + k[None, :])
            right = tl.load(b + column[None, :] * K + first + k[:, None])
            total = tl.dot(left, right, total, input_precision=MODE)
        tl.store(out + row[:, None] * SIZE + column[None, :], total)

    return dot


def chain_error(device: torch.device, chains: tuple[int, ...] = CHAINS) -> dict[str, dict[str, float]] | str:
    """max |error|/|exact| by mode and chain length, of positive operands: their roundings all push one way."""
    try:
        kernel = _dot_kernel()
    except ImportError as error:
        return f"not measured: {error}"
    size, out = 64, {}
    for mode in ("ieee", "tf32x3", "tf32"):
        out[mode] = {}
        for chain in chains:
            a, b = (torch.rand(size, chain, device=device) + 0.5 for _ in range(2))
            got = torch.empty(size, size, device=device)
            kernel[(1,)](a, b, got, chain, MODE=mode, SIZE=size, STEP=32)
            exact = a.double() @ b.double().T
            out[mode][str(chain)] = float(f"{((got - exact).abs() / exact).max().item():.3e}")
    return out


def naive_by_op(device: torch.device, images: int, size: int) -> list[dict[str, Any]]:
    """[{kernel, calls, ms}] of one forward and backward after a warm-up."""
    from torch.profiler import ProfilerActivity, profile

    vjp, x = natural_inputs(images, 3, size, device=device)
    value_and_gradient(naive_head, vjp, x)
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as seen:
        value_and_gradient(naive_head, vjp, x)
        if cuda:
            torch.cuda.synchronize()
    rows = []
    for event in seen.key_averages():
        microseconds = event.self_device_time_total if cuda else event.self_cpu_time_total
        if microseconds > 0:
            rows.append({"kernel": event.key[:120], "calls": event.count, "ms": round(microseconds / 1e3, 4)})
    return sorted(rows, key=lambda row: -row["ms"])[:30]


def main() -> None:
    parser = command_line(__doc__, rounds=0)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--small", action="store_true", help="small sizes: the code, not the machine")
    args = parser.parse_args()
    args.skip_tests = True  # none of it is ours
    device = torch.device(args.device)
    sizes = {"copy": 2**22, "matmul": 128} if args.small else {}
    images, size = (2, 32) if args.small else (128, 224) if device.type == "cuda" else (8, 224)

    def errors() -> dict | str:
        return chain_error(device) if device.type == "cuda" else "not measured: tensor cores are on a GPU"

    measured = {"ceilings": lambda: timing.ceilings(device, **sizes), "chain_error": errors}
    measured["naive_by_op"] = lambda: naive_by_op(device, images, size)
    report(args, "machine", lambda *_: (Item(name, measure) for name, measure in measured.items()))


if __name__ == "__main__":
    main()
