"""Each op and the head: backends × sizes × forward and step (forward + gradient).

make bench                                          the CPU
make bench ARGS="--device cuda --preset quick"      a GPU
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.baselines import HEADS, hsic_objective, natural_inputs, value_and_gradient
from sib_fast import foreground_mask, region_statistics
from sib_fast._backends import REFERENCE
from sib_fast.ops import layer_norm as layer_norm_op
from sib_fast.ops import softmax as softmax_op


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


@pytest.mark.parametrize("mode", ["forward", "step"])
@pytest.mark.benchmark(group="layer_norm")
def test_layer_norm(measure, case, backend, mode, device):
    """A ViT-B/16's tokens. step: value, gradient and double backward, as a VJP and the pass that follows it."""
    if backend not in (*layer_norm_op.KERNELS, REFERENCE):
        pytest.skip(f"layer_norm has no {backend} kernel")
    shape = (case.images, (case.size // 16) ** 2 + 1, 768)
    x, grad_y, u = (torch.randn(shape, device=device).to(getattr(torch, case.dtype)) for _ in range(3))
    parameters = [torch.randn(768, device=device, requires_grad=True) for _ in range(2)]

    def forward(leaf=x):
        return layer_norm_op.layer_norm(leaf, (768,), *parameters, backend=backend)

    def step():
        leaf = x.detach().requires_grad_()
        (vjp,) = torch.autograd.grad(forward(leaf), leaf, grad_y.requires_grad_(), create_graph=True)
        torch.autograd.grad(vjp, (grad_y, leaf, parameters[0]), u)

    measure(forward if mode == "forward" else step, bytes_moved=(2 if mode == "forward" else 10) * x.nbytes)


@pytest.mark.benchmark(group="softmax")
def test_softmaxs_double_backward(measure, case, backend, device):
    """A ViT-B/16's attention, 12 heads. reference: composed of PyTorch's ops."""
    if backend not in (*softmax_op.KERNELS, REFERENCE):
        pytest.skip(f"softmax has no {backend} kernel")
    tokens = (case.size // 16) ** 2 + 1
    u, grad_y, x = (torch.randn(12 * case.images, tokens, tokens, device=device) for _ in range(3))
    made = [t.to(getattr(torch, case.dtype)) for t in (u, grad_y, torch.softmax(3 * x, -1))]
    composed = softmax_op._double_backward_composed
    function = composed if backend == REFERENCE else torch.ops.sib_fast_softmax.double_backward
    measure(lambda: function(*made, True, True), bytes_moved=5 * made[0].nbytes)


@pytest.mark.parametrize("head", sorted(HEADS))
@pytest.mark.benchmark(group="head")
def test_head(measure, case, head, device):
    vjp, x = inputs_of(case, device)
    # SPEC 8: forward reads R twice and x once, backward reads R twice and x once and writes grad_R, and ten planes.
    moved = 7 * vjp.nbytes + 10 * 4 * vjp.numel() // case.channels
    measure(lambda: value_and_gradient(HEADS[head], vjp, x), bytes_moved=moved, rounds=7)
