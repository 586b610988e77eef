"""Each op and the head: backends × sizes × forward and step (forward + gradient).

make bench                                          the CPU
make bench ARGS="--device cuda --preset quick"      a GPU
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.baselines import HEADS, hsic_objective, natural_inputs, value_and_gradient
from sib_fast import foreground_mask, region_statistics


def inputs_of(case, device):
    return natural_inputs(case.images, case.channels, case.size, getattr(torch, case.dtype), device)


@pytest.mark.parametrize("mode", ["forward", "step"])
@pytest.mark.benchmark(group="foreground_mask")
def test_foreground_mask(measure, case, backend, mode, device):
    vjp, _ = inputs_of(case, device)
    plane = vjp.numel() // case.channels
    cotangent = torch.randn(case.images, 1, case.size, case.size, device=device)

    def forward():
        return foreground_mask(vjp, backend=backend)

    def step():
        leaf = vjp.detach().requires_grad_()
        torch.autograd.grad(foreground_mask(leaf, backend=backend), leaf, cotangent)

    moved = vjp.nbytes + 4 * plane + (4 * 3 * plane if mode == "step" else 0)
    measure(forward if mode == "forward" else step, bytes_moved=moved)


@pytest.mark.parametrize("mode", ["forward", "step"])
@pytest.mark.benchmark(group="region_statistics")
def test_region_statistics(measure, case, backend, mode, device):
    vjp, x = inputs_of(case, device)
    mask = torch.rand(case.images, 1, case.size, case.size, device=device)

    def forward(leaf=vjp, soft=mask):
        return region_statistics(leaf, x, soft, backend=backend)

    def step():
        leaf, soft = vjp.detach().requires_grad_(), mask.detach().requires_grad_()
        out = forward(leaf, soft)
        torch.autograd.grad(out.gram_vjp.sum() + out.gram_x.sum() + out.background_variance.sum(), [leaf, soft])

    once = 2 * vjp.nbytes + mask.nbytes
    moved = once if mode == "forward" else 2 * once + vjp.nbytes + mask.nbytes
    measure(forward if mode == "forward" else step, bytes_moved=moved)


@pytest.mark.skipif(hsic_objective is None, reason="this version has no hsic_objective")
@pytest.mark.parametrize("mode", ["forward", "step"])
@pytest.mark.benchmark(group="hsic_objective")
def test_hsic_objective(measure, case, backend, mode, device):
    rows = torch.randn(2, case.images, 512, dtype=torch.float64, device=device)
    grams = rows @ rows.mT
    variance = torch.rand(case.images, dtype=torch.float64, device=device)
    base = torch.ones((), dtype=torch.float64, device=device)
    options = {"lambda_fg": 0.01, "lambda_bg": 1000.0, "backend": backend}

    def forward():
        return hsic_objective(base, grams[0], grams[1], variance, **options)

    def step():
        leaves = [t.detach().requires_grad_() for t in (grams[0], grams[1], variance)]
        torch.autograd.grad(hsic_objective(base, *leaves, **options)[0], leaves)

    moved = grams.nbytes + variance.nbytes
    measure(forward if mode == "forward" else step, bytes_moved=moved if mode == "forward" else 3 * moved)


@pytest.mark.parametrize("head", sorted(HEADS))
@pytest.mark.benchmark(group="head")
def test_head(measure, case, head, device):
    vjp, x = inputs_of(case, device)
    # SPEC 8: forward reads R twice and x once, backward reads R twice and x once and writes grad_R, and ten planes.
    moved = 7 * vjp.nbytes + 10 * 4 * vjp.numel() // case.channels
    measure(lambda: value_and_gradient(HEADS[head], vjp, x), bytes_moved=moved, rounds=7)
