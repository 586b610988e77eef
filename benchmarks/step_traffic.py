"""Bytes, ops, flops and live memory of a training step, counted without running it: any model of torchvision or timm, no GPU.

    python -m benchmarks.step_traffic resnet50 --images 16
    python -m benchmarks.step_traffic --docs            # every model, stored, and the tables of the docs renewed

The step runs on fake tensors, so nothing is computed, and every op that PyTorch dispatches is counted where it is dispatched:

bytes   sizes of its tensor arguments and results; what it writes in place counts as both. A view, an uninitialised
        allocation and a question about a tensor count nothing. One op counts once, whatever it is made of inside, PyTorch's
        batch norm and ours alike: a model of traffic for comparing steps, not a measurement.
flops   convolutions and matrix products, 2 flops a multiply-add, by torch.utils.flop_counter, where our ops are registered;
        a convolution's backward by a formula here, since PyTorch's counts the weight gradient of a grouped convolution as if
        it had one group.
peak    most bytes of tensors alive at once, parameters, gradients and input included; PyTorch's caching is not.

Variants: plain (cross-entropy), naive (sib_fast.lab.naive), ours (SIBLoss attached), ours_prepared (and sib_fast.prepare),
ours_recompute (prepared with recompute=True: less memory, more bytes); and without S-IB, a penalty on the gradient of the
cross-entropy with respect to the input: penalty, penalty_prepared; or EvidenceLoss: area (no mask), share (its own mask), and
these prepared. Networks without a map that evidence could be read at have no such rows.
"""

from __future__ import annotations

import argparse
import collections
import copy
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import conv_flop_count, flop_registry

import sib_fast
from benchmarks.provenance import ROOT, provenance, write_json
from sib_fast.lab.naive import naive_sib_loss
from sib_fast.lab.results import write_atomically
from sib_fast.nn.prepare import SWAPS
from sib_fast.testing.models import differentiable_twice

STORED = ROOT / "benchmarks" / "results" / "accounting" / "step_traffic.json"
MARKS = ("<!-- step_traffic -->", "<!-- /step_traffic -->")
EVIDENCE = ("area", "area_prepared", "share", "share_prepared")
VARIANTS = ("plain", "naive", "ours", "ours_prepared", "ours_recompute", "penalty", "penalty_prepared", *EVIDENCE)
PREPARED = ("ours_prepared", "ours_recompute", "penalty_prepared", "area_prepared", "share_prepared")
# Refused: a normalisation on the last map, tokens.
NO_MAP = ("convnext_tiny", "vit_b_16", "vit_s", "swin_t", "timm:vit_small_patch16_224")
# Layers that are not linear above the last map: no rectified evidence.
ABSOLUTE = ("mobilenet_v3_large",)
PRECISIONS = ("float32", "bf16")
GOAL = ("resnet50", 128, 224)  # in bf16: the goal for a GPU, counted
# The page that shows a variant's rows.
DOCS = {
    ROOT / "docs/step.md": ("plain", "naive", "ours", "ours_prepared", "ours_recompute", *EVIDENCE),
    ROOT / "docs/input_gradients.md": ("plain", "penalty", "penalty_prepared"),
}
MODELS = (
    "resnet18",
    "resnet50",
    "densenet121",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "efficientnet_b0",
    "convnext_tiny",
    "vit_b_16",
    "timm:vit_small_patch16_224",
    "timm:efficientnet_b0",
)
# They read and write nothing. _unsafe_view and _reshape_alias are views that PyTorch does not mark as such.
_FREE = ("prim.device", "aten._unsafe_view", "aten._reshape_alias", "aten.lift_fresh", "aten.sym_")
_ALLOCATIONS = ("aten.empty", "aten.new_empty")


def _convolution_backward(grad_y, x, weight, *rest) -> int:
    need_x, need_weight, _ = rest[-3:]
    return (need_x + need_weight) * conv_flop_count(list(x.shape), list(weight.shape), list(grad_y.shape))


# In the place of PyTorch's formula.
_FLOPS = {
    "sib_fast_convolution.backward": _convolution_backward,
    "aten.convolution_backward": lambda *arguments: _convolution_backward(*arguments[:3], *arguments[-1]),
}


def _written(func: Any, args: tuple, kwargs: dict, results: list[Tensor]) -> list[Tensor]:
    """Arguments that the op writes and does not return: relu_ returns its argument and counts twice, an op of ours does not."""
    given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
    named = (given.get(a.name) for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write)
    return [t for t in named if isinstance(t, Tensor) and not any(t is result for result in results)]


class Traffic(TorchDispatchMode):
    """Counts what is dispatched inside it. bytes, ops, flops: Counters by op name; peak: bytes alive at once since the start."""

    def __init__(self, alive: list[Tensor]) -> None:
        super().__init__()
        self.bytes: collections.Counter[str] = collections.Counter()
        self.ops: collections.Counter[str] = collections.Counter()
        self.flops: collections.Counter[str] = collections.Counter()
        self.peak = self._alive = 0
        self._known: dict[int, weakref.finalize] = {}
        for tensor in alive:
            self._hold(tensor)

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        known = self._known.get(storage._cdata)
        if known is not None and known.alive:
            return
        size = storage.nbytes()
        self._alive += size
        self.peak = max(self.peak, self._alive)
        self._known[storage._cdata] = weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self._alive -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        for result in results:
            self._hold(result)
        name = str(func._overloadpacket)
        if func.is_view or name.startswith((*_FREE, *_ALLOCATIONS)):
            return out
        arguments = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        touched = (*arguments, *results, *_written(func, args, kwargs or {}, results))
        self.bytes[name] += sum(t.numel() * t.element_size() for t in touched)
        self.ops[name] += 1
        self.flops[name] += self._flops_of(func, name, args, kwargs or {}, out)
        return out

    @staticmethod
    def _flops_of(func: Any, name: str, args: tuple, kwargs: dict, out: Any) -> int:
        if name in _FLOPS:
            return _FLOPS[name](*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        return formula(*args, **kwargs, out_val=out) if formula else 0


def penalised_loss(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy and the sum of squares of its gradient with respect to x (Drucker and LeCun 1992)."""
    x = sib_fast.vjp_leaf(x)
    loss = nn.functional.cross_entropy(model(x), target)
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    return loss + gradient.square().sum()


def evidence_loss(variant: str, form: str = "rectified", **options: Any) -> sib_fast.EvidenceLoss:
    return sib_fast.EvidenceLoss(variant.partition("_")[0], evidence=form, **options)


def step_of(
    variant: str, model: nn.Module, x: Tensor, target: Tensor, precision: str = "float32", form: str = "rectified"
) -> Callable[[], None]:
    """One training step without the optimiser, under autocast in bf16; the model is prepared here where the variant says so.
    form: of the evidence, for the variants that have one."""
    loss = _loss_of(variant, model, x, target, form)

    def step() -> None:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
            value = loss()
        value.backward()

    return step


def _loss_of(variant: str, model: nn.Module, x: Tensor, target: Tensor, form: str) -> Callable[[], Tensor]:
    if variant in PREPARED:
        sib_fast.prepare(model, recompute=variant == "ours_recompute")
    if variant == "plain":
        return lambda: nn.functional.cross_entropy(model(x), target)
    if variant == "naive":

        def naive() -> Tensor:
            leaf = x.clone().requires_grad_()
            return naive_sib_loss(model(leaf), target, leaf)

        return naive
    if variant.startswith("penalty"):
        return lambda: penalised_loss(model, x, target)
    criterion = (evidence_loss(variant, form) if variant in EVIDENCE else sib_fast.SIBLoss()).attach(model)
    return lambda: criterion(model(x), target)


def _made(name: str) -> nn.Module:
    package, _, own = name.rpartition(":")
    if package == "timm":
        import timm

        return timm.create_model(own)
    import torchvision.models

    return getattr(torchvision.models, own)()


def count(name: str, variant: str, images: int, size: int, precision: str = "float32") -> Traffic:
    """The traffic of one step of a model, torchvision's or timm:<name>, in training mode, on fake CPU tensors."""
    # Attention that can be differentiated twice, for every variant but plain, which may take the fast one.
    attention = sdpa_kernel([SDPBackend.MATH] if variant != "plain" else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
    real = _made(name)  # some initialisations read values, which fake tensors do not have
    mode = FakeTensorMode()
    with FakeCopyMode(mode):
        model = copy.deepcopy(real)
    with mode, attention:
        if variant != "plain" and not (variant in PREPARED and nn.Hardsigmoid in SWAPS):
            differentiable_twice(model)  # PyTorch's Hardsigmoid is not
        x, target = torch.randn(images, 3, size, size), torch.randint(0, 1000, (images,))
        step = step_of(variant, model, x, target, precision, "absolute" if name in ABSOLUTE else "rectified")
        with Traffic([x, target, *model.parameters(), *model.buffers()]) as traffic:
            step()
    return traffic


def measure(
    name: str, images: int, size: int, variants: tuple[str, ...] = VARIANTS, top: int = 12, precision: str = "float32"
) -> dict[str, Any]:
    possible = [variant for variant in variants if variant not in EVIDENCE or name not in NO_MAP]
    counted = {variant: count(name, variant, images, size, precision) for variant in possible}
    rows = {}
    for variant, traffic in counted.items():
        totals = {
            "gigabytes": round(traffic.bytes.total() / 1e9, 3),
            "ops": traffic.ops.total(),
            "gigaflops": round(traffic.flops.total() / 1e9, 2),
            "peak_gigabytes": round(traffic.peak / 1e9, 3),
        }
        plain = counted["plain"]
        totals["to_plain"] = {
            "bytes": round(traffic.bytes.total() / plain.bytes.total(), 3),
            "ops": round(traffic.ops.total() / plain.ops.total(), 2),
            "flops": round(traffic.flops.total() / plain.flops.total(), 3),
            "peak": round(traffic.peak / plain.peak, 3),
        }
        totals["top_gigabytes"] = {op: [round(b / 1e9, 3), traffic.ops[op]] for op, b in traffic.bytes.most_common(top)}
        rows[variant] = totals
    return {"model": name, "shape": [images, 3, size, size], "precision": precision, "variants": rows}


def table(rows: list[dict[str, Any]], variants: tuple[str, ...] = VARIANTS) -> str:
    """Markdown: a line a model and variant, relative to the plain step."""
    lines = [
        "| model | step | bytes | ops | flops | peak memory | GB moved | ops counted |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        name = row["model"] if row["precision"] == "float32" else f"{row['model']}, {row['shape'][0]} images, {row['precision']}"
        for variant in (v for v in variants if v in row["variants"]):
            t = row["variants"][variant]
            ratio = t["to_plain"]
            lines.append(
                f"| {name} | {variant} | {ratio['bytes']:.2f}× | {ratio['ops']:.1f}× | {ratio['flops']:.2f}× | "
                f"{ratio['peak']:.2f}× | {t['gigabytes']:.1f} | {t['ops']} |"
            )
    return "\n".join(lines)


def stored_table(page: Path) -> str:
    """The table of the stored rows that a page shows."""
    return table(json.loads(STORED.read_text())["rows"], DOCS[page])


def write_docs() -> None:
    """Puts the stored table into each page, between its two marks."""
    for page in DOCS:
        before, rest = page.read_text().split(MARKS[0])
        text = f"{before}{MARKS[0]}\n{stored_table(page)}\n{MARKS[1]}{rest.split(MARKS[1])[1]}"
        write_atomically(page, text.encode())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--precision", choices=PRECISIONS, default="float32", help="bf16: autocast")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--top", type=int, default=12, help="ops listed by bytes, for each variant")
    parser.add_argument("--json", type=Path, help="where to store the rows, with their provenance")
    parser.add_argument("--docs", action="store_true", help="store the rows where the docs' tables come from, and renew those")
    args = parser.parse_args(argv)
    variants = tuple(v for v in VARIANTS if v == "plain" or v in args.variants)
    rows = [measure(name, args.images, args.size, variants, args.top, args.precision) for name in args.models]
    if args.docs:
        rows.append(measure(*GOAL, variants, args.top, "bf16"))
    keep = ("torch", "sib_fast", "commit", "date")
    for path in filter(None, (args.json, STORED if args.docs else None)):
        write_json(path, {**{k: v for k, v in provenance().items() if k in keep}, "rows": rows})
    if args.docs:
        write_docs()
    print(table(rows))
    for row in rows:
        last = next(reversed(row["variants"]))
        print(f"\n{row['model']} {row['shape']} {row['precision']}, {last}, most bytes by op:")
        for op, (gigabytes, times) in row["variants"][last]["top_gigabytes"].items():
            print(f"  {gigabytes:9.3f} GB  {times:5} × {op}")


if __name__ == "__main__":
    main()
