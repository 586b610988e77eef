"""What an S-IB step costs on this machine beside a plain one: the study's closing lines, not a benchmark (`benchmarks/` is)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import sib_fast
from sib_fast.lab.data import NUM_CLASSES
from sib_fast.lab.naive import naive_sib_loss
from sib_fast.lab.networks import build_network
from sib_fast.lab.study.composites import composites
from sib_fast.lab.study.variants import find_variant

LABELS = {
    "plain": "plain training",
    "naive": "S-IB, naive head in plain PyTorch",
    "sib": "S-IB, SIBLoss",
    "prepared": "S-IB, SIBLoss and prepare",
}
FIXED = "_fixed"  # "plain_fixed": the same step on two images, which is nearly all calls and next to no arithmetic
_WARM_UP = 3


def time_steps(arch: str, settings: dict[str, Any], count: int) -> dict[str, float]:
    """Median seconds of an optimiser step of each way of :data:`LABELS`, on one batch, taking turns; with :data:`FIXED` after
    the name, on a batch of two images.

    The same network and settings throughout; torch's own number of threads; neither Lightning nor data loading.
    """
    steps = {
        f"{name}{suffix}": step
        for suffix, images in (("", settings["batch_size"]), (FIXED, 2))
        for name, step in _steps(arch, settings, images).items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(_WARM_UP + count):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            if i >= _WARM_UP:
                seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _steps(arch: str, settings: dict[str, Any], images: int) -> dict[str, Callable[[], None]]:
    data = composites("train", settings | {"train_size": images}, 0)
    sib = find_variant(arch, "sib").sib
    assert sib is not None

    def naive(logits: Tensor, x: Tensor) -> Tensor:
        return naive_sib_loss(logits, data.labels, x, **sib, window_size=7, objective="expm1")

    def ours(logits: Tensor, x: Tensor) -> Tensor:
        return criterion(logits, data.labels, x)

    criterion = sib_fast.SIBLoss(**sib, window_size=7, objective="expm1")
    losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "plain": lambda logits, _: F.cross_entropy(logits, data.labels),
        "naive": naive,
        "sib": ours,
        "prepared": ours,
    }
    return {name: _step(name, loss, arch, settings, data.images) for name, loss in losses.items()}


def _step(
    name: str, loss: Callable[[Tensor, Tensor], Tensor], arch: str, settings: dict[str, Any], images: Tensor
) -> Callable[[], None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_network(arch, NUM_CLASSES, width=settings["width"])
    if name == "prepared":
        sib_fast.prepare(model)
    model.to(memory_format=torch.channels_last)  # as the study trains
    optimiser = torch.optim.AdamW(model.parameters(), lr=settings["lr"], weight_decay=settings["weight_decay"])

    def step() -> None:
        optimiser.zero_grad()
        x = images.detach().requires_grad_(name != "plain")
        loss(model(x), x).backward(inputs=list(model.parameters()))
        optimiser.step()

    return step
