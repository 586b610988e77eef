"""The clock of every benchmark, the device's ceilings, and the floors of SPEC 8.

On CUDA: device events around replays of a CUDA graph (eager launches cost more than the device's work here), the eager wall
time beside it; before each measurement a buffer of several L2s is written, which empties the cache and keeps the device busy
while the host enqueues. On the CPU: perf_counter. Everywhere: warm-up, variants interleaved in one run, a rotating order,
random data, medians with their spread.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

Function = Callable[[], object]


def summary(seconds: Iterable[float]) -> dict[str, float | int]:
    """Median, spread (the middle half: third quartile − first) and range in ms."""
    ms = sorted(1e3 * s for s in seconds)
    quartiles = statistics.quantiles(ms, n=4, method="inclusive") if len(ms) > 1 else [ms[0]] * 3
    digits = {"median": statistics.median(ms), "spread": quartiles[2] - quartiles[0], "min": ms[0], "max": ms[-1]}
    return {**{name: float(f"{value:.5g}") for name, value in digits.items()}, "rounds": len(ms)}


def ratios(slow: list[float], fast: list[float]) -> dict[str, float]:
    """slow/fast within each round, so that a drifting clock meets both."""
    each = [a / b for a, b in zip(slow, fast, strict=True)]
    values = {"median": statistics.median(each), "min": min(each), "max": max(each)}
    return {name: float(f"{value:.4g}") for name, value in values.items()}


class Times(NamedTuple):
    """Seconds a round: by the device's clock (the CPU's is the wall), and eagerly. graph: None if replayed, else why not."""

    device: list[float]
    eager: list[float]
    graph: str | None


def flush_buffer(device: torch.device) -> torch.Tensor | None:
    """Four times the L2, and 256 MiB at least, so that writing it outlasts the host's enqueueing. None on the CPU."""
    if device.type != "cuda":
        return None
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return torch.empty(max(4 * cache, 2**28), dtype=torch.uint8, device=device)


def _captured(function: Function) -> torch.cuda.CUDAGraph | str:
    """The function as a CUDA graph, or why it cannot be one (a host synchronisation, usually)."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(side):
            for _ in range(2):
                function()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        graph.replay()
        torch.cuda.synchronize()
    except RuntimeError as error:
        with contextlib.suppress(RuntimeError):
            torch.cuda.synchronize()
        return f"not captured: {str(error).splitlines()[0][:200]}"
    return graph


def interleaved(variants: dict[str, Function], device: torch.device, rounds: int, *, graph: bool = True) -> dict[str, Times]:
    """`rounds` measurements of every variant, in turn, each round starting with another one. Two warm-ups each before."""
    cuda = device.type == "cuda"
    for function in variants.values():
        for _ in range(2):
            function()
    graphs = {name: _captured(f) if cuda and graph else "eager" for name, f in variants.items()}
    flush = flush_buffer(device)
    out = {name: Times([], [], g if isinstance(g, str) and cuda else None) for name, g in graphs.items()}
    names = list(variants)
    events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
    for k in range(rounds):
        for name in names[k % len(names) :] + names[: k % len(names)]:
            if cuda:
                events.append((name, *_on_device(graphs[name], variants[name], flush)))
            out[name].eager.append(_on_host(variants[name], cuda))
    if cuda:
        torch.cuda.synchronize()
        for name, start, end in events:
            out[name].device.append(start.elapsed_time(end) / 1e3)
        return out
    return {name: times._replace(device=times.eager) for name, times in out.items()}


def _on_device(graph: torch.cuda.CUDAGraph | str, function: Function, flush: torch.Tensor) -> tuple:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    flush.zero_()
    start.record()
    function() if isinstance(graph, str) else graph.replay()
    end.record()
    return start, end


def _on_host(function: Function, cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_extra_bytes(function: Function, device: torch.device) -> int:
    """High-water mark of one call beyond what was held before it, by CUDA's caching allocator. Its results count."""
    if device.type != "cuda":
        raise ValueError("peak_extra_bytes: device must be cuda, got cpu (benchmarks.head reads /proc in a fresh process there)")
    function()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


# ---- ceilings: what this device does at best, measured, never taken from a datasheet ---------------------------------------


@contextlib.contextmanager
def matmul_precision(name: str):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def copy_bandwidth(device: torch.device, size: int | None = None) -> float:
    """Bytes per second of a large copy on the device, read and write counted."""
    size = size or (2**32 if device.type == "cuda" else 2**27)
    source, target = torch.randint(0, 127, (2, size), dtype=torch.uint8, device=device).unbind()
    times = interleaved({"copy": lambda: target.copy_(source)}, device, 10, graph=False)["copy"].device
    return 2 * size / statistics.median(times)


def matmul_rate(device: torch.device, kind: str, size: int | None = None) -> float:
    """Flops per second of a large square product: kind "ieee", "tf32" (float32) or "bf16"."""
    size = size or (8192 if device.type == "cuda" else 1024)
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    with matmul_precision("high" if kind == "tf32" else "highest"):
        times = interleaved({"product": lambda: a @ b}, device, 10, graph=False)["product"].device
    return 2 * size**3 / statistics.median(times)


def ceilings(device: torch.device, **sizes: Any) -> dict[str, float]:
    """copy in bytes/s; ieee, tf32, bf16 and tf32x3 (a third of tf32: three products for one) in flops/s. Sizes for tests."""
    out = {"copy": copy_bandwidth(device, sizes.get("copy"))}
    for kind in ("ieee", "tf32", "bf16") if device.type == "cuda" else ("ieee",):
        out[kind] = matmul_rate(device, kind, sizes.get("matmul"))
    if "tf32" in out:
        out["tf32x3"] = out["tf32"] / 3
    return {name: float(f"{value:.5g}") for name, value in out.items()}


# ---- floors (SPEC 8) --------------------------------------------------------------------------------------------------------


class Phase(NamedTuple):
    """A pass over the maps: bytes it must move through memory, flops of its products."""

    name: str
    bytes: int
    flops: int


def head_phases(images: int, channels: int, height: int, width: int, itemsize: int = 4) -> list[Phase]:
    """The four phases of the head, forward and backward: together 7·ND elements, ten planes and 3 × 2N²D flops."""
    pixels = height * width
    maps, plane = images * channels * pixels * itemsize, 4 * images * pixels
    products = images**2 * channels * pixels
    return [
        Phase("mask", maps + 2 * plane, 0),  # reads R; writes m and M
        Phase("statistics", 2 * maps + plane, 2 * products),  # reads R, x, M; two symmetric products
        Phase("statistics backward", 2 * maps + 2 * plane, 4 * products),  # reads R, x, M; writes grad_M; two full products
        Phase("mask backward", 2 * maps + 5 * plane, 0),  # reads R and the planes of the mask; writes grad_R
    ]


def floor_seconds(phases: Iterable[Phase], bandwidth: float, rate: float) -> float:
    """Sum over the phases of the larger of bytes/bandwidth and flops/rate: no version of that structure runs faster."""
    return sum(max(phase.bytes / bandwidth, phase.flops / rate) for phase in phases)


def floors_ms(phases: Iterable[Phase], measured: dict[str, float]) -> dict[str, float]:
    """The floor for every product mode whose rate was measured."""
    phases = list(phases)
    modes = (name for name in measured if name != "copy")
    return {mode: float(f"{1e3 * floor_seconds(phases, measured['copy'], measured[mode]):.5g}") for mode in modes}
