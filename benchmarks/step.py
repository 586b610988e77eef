"""The training step on the CPU: plain, naive S-IB, ours, ours with `prepare`, interleaved in one run.

    python -m benchmarks.step --out benchmarks/results/<device>/step.json

A step is forward, loss and backward (no optimiser), torchvision models with random weights, 16×3×224×224 float32 by default.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision.models
from torch import nn

import sib_fast
from benchmarks.provenance import provenance, require_green_ops, write_json
from sib_fast.lab.naive import naive_sib_loss


def steps_of(model: nn.Module, images: int, size: int) -> dict[str, Callable[[], None]]:
    """One function a variant; each has its own copy of the model."""
    x, target = torch.randn(images, 3, size, size), torch.randint(0, 10, (images,))

    def plain(net=copy.deepcopy(model)):
        nn.functional.cross_entropy(net(x), target).backward()

    def naive(net=copy.deepcopy(model)):
        leaf = x.clone().requires_grad_()
        naive_sib_loss(net(leaf), target, leaf).backward()

    def ours(net, criterion):
        criterion(net(x), target).backward()

    attached, prepared = copy.deepcopy(model), sib_fast.prepare(copy.deepcopy(model))
    criteria = [sib_fast.SIBLoss().attach(net) for net in (attached, prepared)]
    return {
        "plain": plain,
        "naive": naive,
        "ours": lambda: ours(attached, criteria[0]),
        "ours_prepared": lambda: ours(prepared, criteria[1]),
    }


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["resnet18", "resnet50"])
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--skip-tests", action="store_true", help="for development; the file then says so")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not args.skip_tests:
        require_green_ops()
    rows = [measure(name, args.images, args.size, args.rounds) for name in args.models]
    write_json(args.out, {"tests": "skipped" if args.skip_tests else "green", **provenance(), "rows": rows})
    for row in rows:
        print(row["model"], row["shape"], row["median_s"], row["ratio_to_plain"])


if __name__ == "__main__":
    main()
