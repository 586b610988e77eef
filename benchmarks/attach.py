"""What the hook costs, and what a VJP at a feature map saves: a ResNet-18 step, plain, explicit, attached, attached to a layer.

    python -m benchmarks.attach --out benchmarks/results/<device>/attach.json

16×3×224×224 float32, prepared, training mode, forward and backward, interleaved, each round starting with another variant.
explicit   x.requires_grad_(); criterion(model(x), target, x); x.grad is filled, which the attached form does not pay for
pruned     the same with torch.autograd.backward(loss, inputs=parameters): the explicit form that computes what the attached does
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
from benchmarks.provenance import Item, command_line, report


def steps_of(images: int, size: int) -> dict[str, Callable[[], None]]:
    torch.manual_seed(0)
    model = sib_fast.prepare(torchvision.models.resnet18(num_classes=10))
    x, target = torch.randn(images, 3, size, size), torch.randint(0, 10, (images,))
    nets = {name: copy.deepcopy(model) for name in ("plain", "explicit", "pruned", "attached", "layer3")}
    criterion = sib_fast.SIBLoss()
    attached = sib_fast.SIBLoss().attach(nets["attached"])
    of_layer = sib_fast.SIBLoss().attach(nets["layer3"], layer="layer3")

    def explicit(name: str, prune: bool) -> None:
        leaf = x.detach().requires_grad_()
        loss = criterion(nets[name](leaf), target, leaf)
        torch.autograd.backward(loss, inputs=list(nets[name].parameters()) if prune else None)

    steps = {
        "plain": lambda: nn.functional.cross_entropy(nets["plain"](x), target).backward(),
        "explicit": lambda: explicit("explicit", False),
        "pruned": lambda: explicit("pruned", True),
        "attached": lambda: attached(nets["attached"](x), target).backward(),
        "layer3": lambda: of_layer(nets["layer3"](x), target).backward(),
    }

    def with_zero_grad(name: str) -> Callable[[], None]:
        def step() -> None:
            nets[name].zero_grad()
            steps[name]()

        return step

    return {name: with_zero_grad(name) for name in steps}


def measure(images: int, size: int, rounds: int) -> dict:
    steps = steps_of(images, size)
    for step in steps.values():
        step()
    names = list(steps)
    times: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(rounds):
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            start = time.perf_counter()
            steps[name]()
            times[name].append(time.perf_counter() - start)

    def ratio(name: str, to: str) -> dict[str, float]:
        ratios = [a / b for a, b in zip(times[name], times[to], strict=True)]
        return {"median": round(statistics.median(ratios), 4), "min": round(min(ratios), 4), "max": round(max(ratios), 4)}

    return {
        "model": "resnet18",
        "shape": [images, 3, size, size],
        "rounds": rounds,
        "median_s": {name: round(statistics.median(t), 4) for name, t in times.items()},
        "ratio_to_plain": {name: ratio(name, "plain") for name in names},
        "attached_to_pruned": ratio("attached", "pruned"),
        "layer3_to_attached": ratio("layer3", "attached"),
    }


def main() -> None:
    args = command_line(__doc__, rounds=9).parse_args()
    for row in report(args, "attach", lambda *_: [Item("resnet18", lambda: measure(16, 224, args.rounds))]):
        print(row)


if __name__ == "__main__":
    main()
