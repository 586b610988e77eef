"""The training step on the CPU: plain, naive S-IB, ours, ours with `prepare`, interleaved in one run.

    python -m benchmarks.step --out benchmarks/results/<device>/step.json

A step is forward, loss and backward (no optimiser), torchvision models with random weights, 16×3×224×224 float32 by default.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable

import torch
import torchvision.models
from torch import nn

import sib_fast
from benchmarks.provenance import command_line, report
from sib_fast.lab.naive import naive_sib_loss


def steps_of(model: nn.Module, images: int, size: int) -> dict[str, Callable[[], None]]:
    """One function a variant; each has its own copy of the model."""
    x, target = torch.randn(images, 3, size, size), torch.randint(0, 10, (images,))
    nets = {variant: copy.deepcopy(model) for variant in ("plain", "naive", "ours", "ours_prepared")}
    sib_fast.prepare(nets["ours_prepared"])
    criteria = {variant: sib_fast.SIBLoss().attach(nets[variant]) for variant in ("ours", "ours_prepared")}

    def plain() -> None:
        nn.functional.cross_entropy(nets["plain"](x), target).backward()

    def naive() -> None:
        leaf = x.clone().requires_grad_()
        naive_sib_loss(nets["naive"](leaf), target, leaf).backward()

    def attached(variant: str) -> Callable[[], None]:
        return lambda: criteria[variant](nets[variant](x), target).backward()

    return {"plain": plain, "naive": naive, "ours": attached("ours"), "ours_prepared": attached("ours_prepared")}


def measure(name: str, images: int, size: int, rounds: int) -> dict:
    torch.manual_seed(0)
    steps = steps_of(getattr(torchvision.models, name)(num_classes=10), images, size)
    times: dict[str, list[float]] = {variant: [] for variant in steps}
    for round_ in range(rounds + 1):
        for variant, step in steps.items():
            start = time.perf_counter()
            step()
            if round_ > 0:  # the first is the warm-up
                times[variant].append(time.perf_counter() - start)
    row = {
        "model": name,
        "shape": [images, 3, size, size],
        "rounds": rounds,
        "median_s": {variant: round(statistics.median(t), 4) for variant, t in times.items()},
    }
    row["ratio_to_plain"] = {
        variant: round(statistics.median(a / b for a, b in zip(t, times["plain"], strict=True)), 3)
        for variant, t in times.items()
    }
    return row


def main() -> None:
    parser = command_line(__doc__, rounds=5)
    parser.add_argument("--models", nargs="+", default=["resnet18", "resnet50"])
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    args = parser.parse_args()
    for row in report(args, lambda: [measure(name, args.images, args.size, args.rounds) for name in args.models]):
        print(row["model"], row["shape"], row["median_s"], row["ratio_to_plain"])


if __name__ == "__main__":
    main()
