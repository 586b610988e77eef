"""The training step: plain, naive S-IB, ours, each eager and compiled, interleaved in one run.

    python -m benchmarks.step --out benchmarks/results/<device>/step.json
    python -m benchmarks.step --device cuda --preset goals --out benchmarks/results/<gpu>/step.json

--preset: goals, the two cells that the goals are about; table, all models, precisions and layouts, those two first; compiled,
each compiled variant by itself, since building one takes minutes. Times, memory and profile of a row are stored as they come.

A step is zero_grad, forward, loss and backward (no optimiser), random weights and data, in training mode.

variants    plain, naive (sib_fast.lab.naive), ours (SIBLoss attached), ours_prepared (and sib_fast.prepare), lazy (prepared,
            every=4: the mean of four steps), recompute (prepared with recompute=True), penalty and penalty_prepared (no S-IB:
            cross-entropy and a penalty on its input gradient), area, share and their _prepared forms (EvidenceLoss; not of
            networks without a map for it), share_lazy (every=4, as lazy), plain_compiled, naive_compiled (the whole naive step in one
            torch.compile region), ours_compiled (prepared, sib_fast.compile_step), convolutions_compiled (the same, of our
            layers the convolutions alone, so that the compiler fuses the rest itself). On the CPU the compiled ones run on
            request only: minutes to build.
precision   float32, tf32 (CUDA: tensor cores for float32 products), bf16 (autocast)
layout      contiguous, channels_last (model and images)

Reported: median seconds, images a second, the median of the ratios to plain within a round, peak memory (CUDA: the allocator's;
CPU: resident high-water mark of a fresh process), the cosine of the VJP to the float32 one, and with --profile where ours'
time goes. Attention runs PyTorch's math kernel in every variant but plain, which may take a fused one.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import dataclasses
import gc
import itertools
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import sib_fast
from benchmarks import gate
from benchmarks.journal import ROOT, Journal, attempts
from benchmarks.provenance import Item, command_line, report
from benchmarks.step_traffic import EVIDENCE, NO_MAP, evidence_loss, penalised_loss
from sib_fast.lab.naive import naive_sib_loss

EAGER = ("plain", "naive", "ours", "ours_prepared", "lazy", "recompute", "penalty", "penalty_prepared", *EVIDENCE, "share_lazy")
LAZY = ("lazy", "share_lazy")
COMPILED = ("plain_compiled", "naive_compiled", "ours_compiled", "convolutions_compiled")
PRECISIONS = ("float32", "tf32", "bf16")
LAYOUTS = ("contiguous", "channels_last")
LAZY_EVERY = 4
# All layers ours.
PREPARED = ("ours_prepared", "lazy", "recompute", "penalty_prepared", "area_prepared", "share_prepared", "ours_compiled")
# The ops with kernels of their own that a prepared model runs.
LAYERS = {"convnext_tiny": ("layer_norm", "activation"), "vit_s": ("layer_norm", "softmax", "activation")}
DEFAULT_LAYERS = ("batch_norm", "activation")


def _torchvision(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import torchvision.models

        return getattr(torchvision.models, name)()

    return make


def _vit_s() -> nn.Module:
    from torchvision.models import VisionTransformer

    model = VisionTransformer(224, 16, num_layers=12, num_heads=6, hidden_dim=384, mlp_dim=1536)
    # torchvision starts the head at zero, which would make the VJP zero.
    nn.init.normal_(model.heads.head.weight, std=0.02)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": _torchvision("resnet18"),
    "resnet50": _torchvision("resnet50"),
    "convnext_tiny": _torchvision("convnext_tiny"),
    "vit_s": _vit_s,
}


@dataclass(frozen=True)
class Setting:
    """One cell of the table. Shapes: images [images, 3, size, size]."""

    model: str
    images: int
    size: int
    device: str
    precision: str = "float32"
    layout: str = "contiguous"
    compile_mode: str = "default"
    backend: str = "auto"  # of the loss

    def autocast(self) -> torch.autocast:
        """For the forward pass and the loss; backward runs outside."""
        return torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.precision == "bf16")

    @contextlib.contextmanager
    def products(self) -> Iterator[None]:
        """Whether float32 products use TF32, for a whole step; put back afterwards."""
        before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self.precision == "tf32"
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before

    def make_model(self) -> nn.Module:
        torch.manual_seed(0)
        model = MODELS[self.model]().to(self.device)
        return model.to(memory_format=torch.channels_last) if self.layout == "channels_last" else model

    def make_batch(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(self.images, 3, self.size, self.size, generator=generator).to(self.device)
        target = torch.randint(0, 7, (self.images,), generator=generator).to(self.device)
        return (x.contiguous(memory_format=torch.channels_last) if self.layout == "channels_last" else x), target


def needs_of(variant: str, setting: Setting) -> list[str]:
    """The verdicts behind a variant's figures (benchmarks/gate.py); PyTorch's own step needs none."""
    loss = variant in EAGER[2:6] or variant in COMPILED[2:] or variant.startswith("share")
    found = gate.needs_of_head(setting.backend, setting.device) if loss else []
    layers = LAYERS.get(setting.model, DEFAULT_LAYERS) if variant in PREPARED else ()
    return found + gate.needs(gate.families("auto", layers, setting.device))


def loss_of(
    variant: str, model: nn.Module, compile_mode: str = "default", backend: str = "auto"
) -> Callable[[Tensor, Tensor], Tensor]:
    """loss(x, target) of one variant on this model, which it prepares where the variant says so."""
    if variant in (*PREPARED, "convolutions_compiled"):
        only = (nn.Conv2d,) if variant == "convolutions_compiled" else None
        sib_fast.prepare(model, recompute=variant == "recompute", only=only)
    if variant == "plain":
        return lambda x, target: F.cross_entropy(model(x), target)
    if variant == "plain_compiled":
        compiled = torch.compile(model, mode=compile_mode)
        return lambda x, target: F.cross_entropy(compiled(x), target)

    def naive(x: Tensor, target: Tensor) -> Tensor:
        return naive_sib_loss(model(x), target, x)

    if variant == "naive":
        return lambda x, target: naive(x.clone().requires_grad_(), target)
    if variant.startswith("penalty"):
        return lambda x, target: penalised_loss(model, x, target)
    if variant == "naive_compiled":
        compiled_naive = torch.compile(naive, fullgraph=True, mode=compile_mode)

        def run(x: Tensor, target: Tensor) -> Tensor:
            with torch._dynamo.config.patch(trace_autograd_ops=True):
                return compiled_naive(x.clone().requires_grad_(), target)

        return run
    options = {"every": LAZY_EVERY if variant in LAZY else 1, "backend": backend}
    criterion = evidence_loss(variant, **options) if variant.startswith(EVIDENCE) else sib_fast.SIBLoss(**options)
    if variant in ("ours_compiled", "convolutions_compiled"):
        step = sib_fast.compile_step(model, criterion, mode=compile_mode)
        return lambda x, target: step(x, target).loss
    criterion.attach(model)
    return lambda x, target: criterion(model(x), target)


def step_of(variant: str, model: nn.Module, x: Tensor, target: Tensor, setting: Setting) -> Callable[[], None]:
    """One training step, ready to be called again and again; of "lazy" so many that the terms applied once."""
    loss = loss_of(variant, model, setting.compile_mode, setting.backend)

    def once() -> None:
        model.zero_grad(set_to_none=True)
        fused = contextlib.nullcontext() if variant.startswith("plain") else sdpa_kernel(SDPBackend.MATH)
        with setting.products():
            with setting.autocast(), fused:
                value = loss(x, target)
            value.backward()

    if variant not in LAZY:
        return once
    return lambda: [once() for _ in range(LAZY_EVERY)] and None


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def interleaved(setting: Setting, variants: tuple[str, ...], rounds: int) -> dict[str, list[float]]:
    """Seconds of a step, variants in turn, so that a drifting clock meets all of them. Each has a model of its own."""
    model, (x, target) = setting.make_model(), setting.make_batch()
    steps = {variant: step_of(variant, copy.deepcopy(model), x, target, setting) for variant in variants}
    times: dict[str, list[float]] = {variant: [] for variant in variants}
    warmups = 3 if setting.device == "cuda" else 1
    for round_ in range(rounds + warmups):
        for variant, step in steps.items():
            synchronise(setting.device)
            start = time.perf_counter()
            step()
            synchronise(setting.device)
            if round_ >= warmups:
                times[variant].append((time.perf_counter() - start) / (LAZY_EVERY if variant in LAZY else 1))
    return times


# ---- memory -------------------------------------------------------------------------------------------------------------


def _status(field: str) -> int:
    return 1024 * int(re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE).group(1))


def peak_bytes_here(setting: Setting, variant: str) -> int:
    """Most memory of two steps, model, gradients and batch included, beyond what the process held before."""
    # Libraries and thread pools first, on another model.
    small = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 7))
    small, x = small.to(setting.device), torch.randn(2, 3, 64, 64, device=setting.device)
    step_of(variant.removesuffix("_compiled"), small, x, torch.zeros(2, dtype=torch.int64, device=setting.device), setting)()
    del small, x
    gc.collect()
    if setting.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = _status("VmRSS")
    step = step_of(variant, setting.make_model(), *setting.make_batch(), setting)
    step()
    if variant.endswith("_compiled") and setting.device == "cuda":
        torch.cuda.reset_peak_memory_stats()  # without what compiling took
    step()
    return (torch.cuda.max_memory_allocated() if setting.device == "cuda" else _status("VmHWM")) - before


def peak_bytes(setting: Setting, variant: str) -> int:
    """peak_bytes_here; on a CPU in a fresh process, since freed memory of earlier steps would be used again, unseen."""
    if setting.device == "cuda":
        return peak_bytes_here(setting, variant)
    code = (
        "import torch; from benchmarks.step import *; "
        f"torch.set_num_threads({torch.get_num_threads()}); print(peak_bytes_here(Setting(**{asdict(setting)!r}), {variant!r}))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"peak memory of {variant}: {result.stderr[-2000:]}")
    return int(result.stdout.split()[-1])


# ---- numbers and where the time goes ------------------------------------------------------------------------------------


def vjp(setting: Setting) -> Tensor:
    """The energy's VJP of the prepared model under this setting's precision and layout. Shapes: float64 [N, C, H, W]."""
    model, (x, _) = sib_fast.prepare(setting.make_model()), setting.make_batch()
    x.requires_grad_()
    with setting.products(), setting.autocast(), sdpa_kernel(SDPBackend.MATH):
        return sib_fast.vjp_map(model(x), x, create_graph=False).double()


def cosine_to_float32(setting: Setting) -> float:
    """Cosine of the whole batch's VJP to that of float32, same weights and layout."""
    exact = vjp(Setting(**{**asdict(setting), "precision": "float32"}))
    return float(F.cosine_similarity(vjp(setting).flatten(), exact.flatten(), dim=0))


# The first group whose pattern is found in the op's or kernel's name.
GROUPS = {
    "head": "foreground_mask|region_statistics|finalise|hsic",
    "convolution": "conv|cudnn|wgrad|dgrad|fprop|implicit",
    "normalisation": "batch_norm|layer_norm|group_norm|bn_|LayerNorm",
    "products and attention": r"mm$|mm_|addmm|matmul|gemm|cutlass|softmax|attention|linear",
    "pooling": "pool",
    "copies and fills": "copy|clone|fill|zero|Memset|Memcpy|cat",
    "activation": "relu|threshold|silu|gelu|hardswish|hardsigmoid|sigmoid",
    "compiled": "triton_|Compiled|inductor",
    "elementwise": "add|mul|div|sub|elementwise|sum|reduce|mean|neg|pow",
}


def group_of(name: str) -> str:
    return next((group for group, pattern in GROUPS.items() if re.search(pattern, name)), "other")


def profile(setting: Setting, variant: str) -> dict[str, float]:
    """Share of the time of one step by group of ops: device time on CUDA, otherwise the CPU's own time of each op."""
    from torch.profiler import ProfilerActivity

    step = step_of(variant, setting.make_model(), *setting.make_batch(), setting)
    step()
    cuda = setting.device == "cuda"
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        step()
        synchronise(setting.device)
    seconds: collections.Counter[str] = collections.Counter()
    for event in profiler.key_averages():
        spent = event.self_device_time_total if cuda else event.self_cpu_time_total
        on_device = str(event.device_type).endswith("CUDA")
        if spent > 0 and on_device == cuda:
            seconds[group_of(event.key)] += spent
    return {group: round(spent / seconds.total(), 4) for group, spent in seconds.most_common()}


def measure(setting: Setting, variants: tuple[str, ...], rounds: int) -> dict[str, Any]:
    times = interleaved(setting, variants, rounds)
    _free(setting)
    medians = {variant: statistics.median(t) for variant, t in times.items()}
    ratios = {v: [a / b for a, b in zip(t, times["plain"], strict=True)] for v, t in times.items()}
    return {
        **asdict(setting),
        "shape": [setting.images, 3, setting.size, setting.size],
        "rounds": rounds,
        "device_name": torch.cuda.get_device_name() if setting.device == "cuda" else "cpu",
        "median_s": {variant: round(seconds, 5) for variant, seconds in medians.items()},
        "images_per_s": {variant: round(setting.images / seconds, 1) for variant, seconds in medians.items()},
        "ratio_to_plain": {variant: round(statistics.median(r), 3) for variant, r in ratios.items()},
        "ratio_range": {variant: [round(min(r), 3), round(max(r), 3)] for variant, r in ratios.items()},
        "needs": {variant: needs_of(variant, setting) for variant in variants},
    }


def measure_memory(setting: Setting, variants: tuple[str, ...]) -> dict[str, Any]:
    peaks = {variant: peak_bytes(setting, variant) for variant in variants}
    _free(setting)
    return {
        "peak_mib": {variant: round(peak / 2**20, 1) for variant, peak in peaks.items()},
        "peak_to_plain": {variant: round(peak / peaks["plain"], 3) for variant, peak in peaks.items()},
    }


def _free(setting: Setting) -> None:
    gc.collect()
    if setting.device == "cuda":
        torch.cuda.empty_cache()


# ---- what is measured, in which order -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """A row to be measured: a setting and its variants."""

    setting: Setting
    variants: tuple[str, ...]


def preset(name: str, device: str, images: int = 128, size: int = 224) -> list[Cell]:
    """goals: ResNet-50 in bf16, channels last, and as the authors run it. table: these, then every other cell. compiled."""

    def cell(model: str, precision: str, layout: str, *variants: str) -> Cell:
        return Cell(Setting(model, images, size, device, precision, layout), ("plain", *variants))

    full, best = ("naive", "ours", "ours_prepared", "lazy", "recompute"), ("bf16", "channels_last")
    first = [("resnet50", *best), ("resnet50", "float32", "contiguous")]
    if name == "compiled":
        return [
            cell(*first[0], "ours_prepared", "plain_compiled", variant)
            for variant in ("ours_compiled", "convolutions_compiled", "naive_compiled")
        ]
    if name == "goals":
        return [cell(*key, *full) for key in first]
    keys = [*first, *((model, *best) for model in ("convnext_tiny", "vit_s", "resnet18"))]
    keys += itertools.product(("resnet50", "resnet18", "convnext_tiny", "vit_s"), PRECISIONS, LAYOUTS)
    cells = [cell(*key, *full) for key in dict.fromkeys(keys)]
    return [*cells[:5], cell(*first[0], "penalty", "penalty_prepared"), *cells[5:]]


def goals(rows: list[dict[str, Any]]) -> dict[str, float]:
    """What is expected of ResNet-50 in bf16, channels last, from the rows that are there: ours over plain, naive over ours at
    the same settings and as the authors run it (float32, contiguous, eager), peak memory over plain's."""
    found: dict[str, float] = {}
    naive_float32 = None
    for row in (row for row in rows if "median_s" in row and row["model"] == "resnet50"):
        seconds, key = row["median_s"], (row["precision"], row["layout"])
        if key == ("float32", "contiguous") and "naive" in seconds:
            naive_float32 = seconds["naive"]
        if key == ("bf16", "channels_last") and {"naive", "ours_prepared"} <= set(seconds):
            found["ours_prepared_over_plain"] = row["ratio_to_plain"]["ours_prepared"]
            found["naive_over_ours_prepared"] = round(seconds["naive"] / seconds["ours_prepared"], 3)
            ours = seconds["ours_prepared"]
            for variant in ("ours_prepared", "recompute"):
                if variant in row.get("peak_to_plain", {}):
                    found[f"peak_of_{variant}_over_plain"] = row["peak_to_plain"][variant]
    if naive_float32 is not None and "naive_over_ours_prepared" in found:
        found["naive_as_the_authors_over_ours_prepared"] = round(naive_float32 / ours, 3)
    return found


def parser() -> argparse.ArgumentParser:
    parser = command_line(__doc__, rounds=5)
    parser.add_argument(
        "--preset", choices=("goals", "table", "compiled"), help="instead of models, precisions, layouts, variants"
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["resnet18", "resnet50"])
    parser.add_argument(
        "--variants", nargs="+", choices=(*EAGER, *COMPILED), help="default: all on CUDA, the eager ones on a CPU"
    )
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=["float32"])
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=["contiguous"])
    parser.add_argument("--images", type=int, help="default: 16, of the preset 128")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--compile-mode", default="default", help="torch.compile's mode, for example reduce-overhead")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--profile", action="store_true")
    return parser


def cells(args: argparse.Namespace) -> list[Cell]:
    """What was asked for; tf32 exists on CUDA only."""
    if args.preset:
        asked = preset(args.preset, args.device, args.images or 128, args.size)
    else:
        chosen = args.variants or (*EAGER, *(COMPILED if args.device == "cuda" else ()))
        variants = tuple(v for v in (*EAGER, *COMPILED) if v == "plain" or v in chosen)
        grid = itertools.product(args.models, args.precisions, args.layouts)
        images = args.images or 16
        asked = [
            Cell(
                Setting(model, images, args.size, args.device, precision, layout, args.compile_mode),
                tuple(v for v in variants if model not in NO_MAP or not v.startswith(EVIDENCE)),
            )
            for model, precision, layout in grid
        ]
    return [cell for cell in asked if cell.setting.precision != "tf32" or args.device == "cuda"]


def items_of(cell: Cell, journal: Journal, found: dict[str, dict], args: argparse.Namespace) -> Iterator[Item]:
    """Times, memory and profile of a cell, without the variants whose ops are red."""
    setting = cell.setting
    setting = dataclasses.replace(setting, backend=gate.loss_backend(found, setting.device) or "auto")
    red = {v: why for v in cell.variants if (why := gate.red(found, needs_of(v, setting)))}
    variants = tuple(v for v in cell.variants if v not in red)
    name = f"{setting.model} {setting.images}×{setting.size} {setting.precision} {setting.layout} {setting.compile_mode}"
    name = f"{name}: {' '.join(variants[1:])}"
    for item, chosen in attempts(journal, "step", name, variants, ("plain",)):
        yield Item(item, lambda v=chosen: {**measure(setting, v, args.rounds), "left_out": red})
        parts = {"cosine": lambda: {"vjp_cosine_to_float32": round(cosine_to_float32(setting), 6)}}
        if not args.no_memory:
            parts["memory"] = lambda v=chosen: measure_memory(setting, v)
        if args.profile:
            profiled = [v for v in ("plain", "ours_prepared", "ours_compiled") if v in chosen]
            parts["profile"] = lambda p=profiled: {"profile": {v: profile(setting, v) for v in p}}
        if journal.state("step", item) == "done":
            yield from (Item(f"{item}, {part}", measure_part, part_of=item) for part, measure_part in parts.items())


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    rows = report(args, "step", lambda journal, found: (i for cell in cells(args) for i in items_of(cell, journal, found, args)))
    failed = [row for row in rows if "failed" in row]
    for row in (row for row in rows if row not in failed):
        print(json.dumps({k: row[k] for k in ("model", "shape", "precision", "layout", "median_s", "ratio_to_plain")}))
        print("   ", json.dumps({k: row[k] for k in ("peak_to_plain", "vjp_cosine_to_float32", "profile") if k in row}))
    print("goals:", json.dumps(goals(rows)))
    for row in failed:
        print("FAILED", json.dumps(row))
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
