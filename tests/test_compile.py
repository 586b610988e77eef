"""The whole S-IB step in one graph: forward, VJP, head and loss, exact against eager."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sib_fast

trace_autograd_ops = pytest.mark.skipif(
    not hasattr(torch._dynamo.config, "trace_autograd_ops"), reason="this torch cannot trace torch.autograd.grad"
)


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10)
    ).double()


def gradients(step, net, x, y):
    net.zero_grad()
    loss = step(x.clone().requires_grad_(), y)
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in net.parameters()]


@trace_autograd_ops
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_compiled_step_is_the_eager_step(backend):
    net, x, y = network(), torch.randn(6, 3, 24, 24).double(), torch.randint(0, 10, (6,))
    criterion = sib_fast.SIBLoss(1.0, 1e4, window_size=7, backend=backend)

    def step(x, y):
        return criterion(net(x), y, x)

    want = gradients(step, net, x, y)
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        got = gradients(torch.compile(step, fullgraph=True, backend="aot_eager"), net, x, y)
    base = gradients(lambda x, y: nn.functional.cross_entropy(net(x), y), net, x, y)
    torch.testing.assert_close(got[0], want[0], rtol=1e-12, atol=0)
    scale = max(w.norm() for w in want[1])
    for g, w in zip(got[1], want[1], strict=True):
        assert (g - w).norm() <= 1e-11 * scale
    # A compiler that dropped the second derivative in silence would give the base loss's gradients: far outside that bound.
    assert max((w - b).norm() for w, b in zip(want[1], base[1], strict=True)) > 1e-8 * scale


@trace_autograd_ops
def test_vjp_map_compiles():
    net, x = network(), torch.randn(4, 3, 16, 16).double()

    def square(x):
        return sib_fast.vjp_map(net(x), x).square().sum()

    want = gradients(lambda x, y: square(x), net, x, None)
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        compiled = torch.compile(square, fullgraph=True, backend="aot_eager")
        got = gradients(lambda x, y: compiled(x), net, x, None)
    for g, w in zip(got[1], want[1], strict=True):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-22)
