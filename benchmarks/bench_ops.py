"""Throughput of each op and of the head on the CPU: `make bench` (pytest-benchmark)."""

from __future__ import annotations

import pytest
import torch

from benchmarks.baselines import HEADS, forward_and_backward, natural_inputs
from sib_fast import foreground_mask, region_statistics

SHAPES = [(16, 3, 224), (64, 3, 32), (16, 256, 14)]
BACKENDS = ["cpu", "reference"]


@pytest.mark.parametrize("mode", ["forward", "step"])  # step = forward + gradient
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.benchmark(group="foreground_mask")
def test_foreground_mask(measure, shape, backend, mode):
    vjp, _ = natural_inputs(*shape)
    plane = vjp.numel() // shape[1]
    cotangent = torch.randn(shape[0], 1, shape[2], shape[2])

    def forward():
        return foreground_mask(vjp, backend=backend)

    def step():
        leaf = vjp.detach().requires_grad_()
        torch.autograd.grad(foreground_mask(leaf, backend=backend), leaf, cotangent)

    moved = 4 * (vjp.numel() + plane) + (4 * 3 * plane if mode == "step" else 0)
    measure(forward if mode == "forward" else step, bytes_moved=moved)


@pytest.mark.parametrize("mode", ["forward", "step"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.benchmark(group="region_statistics")
def test_region_statistics(measure, shape, backend, mode):
    vjp, x = natural_inputs(*shape)
    mask = torch.rand(shape[0], 1, shape[2], shape[2])

    def forward(leaf=vjp, soft=mask):
        return region_statistics(leaf, x, soft, backend=backend)

    def step():
        leaf, soft = vjp.detach().requires_grad_(), mask.detach().requires_grad_()
        out = forward(leaf, soft)
        torch.autograd.grad(out.gram_vjp.sum() + out.gram_x.sum() + out.background_variance.sum(), [leaf, soft])

    once = 4 * (2 * vjp.numel() + mask.numel())
    measure(
        forward if mode == "forward" else step,
        bytes_moved=once if mode == "forward" else 2 * once + 4 * (vjp.numel() + mask.numel()),
    )


@pytest.mark.parametrize("head", sorted(HEADS))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.benchmark(group="head")
def test_head(measure, shape, head):
    vjp, x = natural_inputs(*shape)
    # SPEC 8: forward reads R twice and x once, backward reads R twice and x once and writes grad_R, and ten planes.
    moved = 7 * 4 * vjp.numel() + 10 * 4 * vjp.numel() // shape[1]
    measure(lambda: forward_and_backward(head, vjp, x), bytes_moved=moved, rounds=7)
