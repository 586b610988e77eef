"""FlopCounterMode: a prepared network counts what the plain one does, and the head what its products are."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import sib_fast
from sib_fast import SIBLoss, _backends
from sib_fast.ops import _flops
from sib_fast.ops._flops import register_flops
from sib_fast.ops.region_statistics import region_statistics
from sib_fast.testing.networks import AttentionNet, image_batch


def network() -> nn.Sequential:
    """Strided stem of few channels (by phases), depthwise 5×5 (in channels last), groups, a small map (by map), dilation, 1×1."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 5, padding=2, groups=8),
        nn.Conv2d(8, 16, 3, groups=4, dilation=2, padding_mode="reflect", padding=2),
        nn.MaxPool2d(4),
        nn.Conv2d(16, 128, 3, padding="same", bias=False),
        nn.Conv2d(128, 4, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 5),
    )


def counted(model: nn.Module, x: Tensor, backward: bool) -> FlopCounterMode:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        y = model(x)
        if backward:
            y.square().sum().backward()
    return counter


@pytest.mark.parametrize("input_gradient", [False, True])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (network, (2, 3, 32, 30)),
        (lambda: nn.Sequential(nn.Conv1d(3, 4, 3, stride=2), nn.Conv1d(4, 4, 3, groups=2)), (2, 3, 20)),
        (lambda: nn.Sequential(nn.Conv3d(3, 4, 3), nn.Conv3d(4, 2, 2, stride=2)), (2, 3, 8, 7, 6)),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 3, 2)), (2, 3, 9, 8)),
        (AttentionNet, (2, 3, 8, 8)),
        (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (2, 5, 8)),
    ],
    ids=["2d", "1d", "3d", "transposed", "attention", "MultiheadAttention"],
)
def test_a_prepared_network_counts_as_the_plain_one(make, shape, backward, input_gradient):
    model, x = make(), torch.randn(shape, requires_grad=input_gradient)
    plain = counted(model, x, backward)
    prepared = counted(sib_fast.prepare(model), x, backward)
    assert prepared.get_total_flops() == plain.get_total_flops() > 0
    of_modules = [{name: sum(counts.values()) for name, counts in c.get_flop_counts().items()} for c in (plain, prepared)]
    assert of_modules[0] == of_modules[1]
    assert len(of_modules[0]) > 2


def test_a_layer_by_hand_up_to_the_double_backward():
    """The VJP, and of its gradient: the convolution of u for grad_y, the weight gradient with u, and the first backward again."""
    layer = sib_fast.prepare(nn.Conv2d(3, 4, 3, bias=False))
    one = 2 * 27 * (2 * 4 * 6 * 5)  # multiply-adds twice: taps of an output, outputs
    # The counter's module tracker hooks a layer's input and cannot see a leaf that a gradient is asked of (pytorch#131753).
    x = torch.randn(2, 3, 8, 7, requires_grad=True).clone()
    with FlopCounterMode(display=False) as counter:
        y = layer(x)
        assert counter.get_total_flops() == one
        (vjp,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        assert counter.get_total_flops() == 2 * one
        torch.autograd.grad(vjp.square().sum(), layer.weight)
    # u convolved, u's weight gradient; y's own: grad_y (elementwise) and then the weight gradient of the forward
    assert counter.get_total_flops() == 2 * one + 3 * one


def products(background_grams: bool, needs: tuple[bool, bool, bool]) -> tuple[int, int]:
    """Gram products of [N, D] rows, forward and backward."""
    vjp, x, mask = needs
    many = 2 if background_grams else 1
    return 2 * many, ((vjp or mask) + (x or mask)) * many


@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)])
@pytest.mark.parametrize("background_grams", [False, True])
def test_the_heads_products(kernel, background_grams, needs):
    if kernel == "reference":
        pytest.skip("made of torch's own products, which are counted as they are")
    tensors = [torch.rand(3, c, 4, 5, requires_grad=need) for c, need in zip((2, 2, 1), needs, strict=True)]
    one = 2 * 3 * 3 * 40
    forward, backward = products(background_grams, needs)
    with FlopCounterMode(display=False) as counter:
        out = region_statistics(*tensors, background_grams=background_grams, backend=kernel)
        assert counter.get_total_flops() == forward * one
        sum(part.sum() for part in out if part is not None).backward()
    assert counter.get_total_flops() == (forward + backward) * one


def test_a_whole_step_with_the_loss():
    if (reason := _backends.why_not("cpu")) is not None:
        pytest.skip(reason)
    model, (x, target) = sib_fast.prepare(network()), image_batch(height=32, width=32)
    criterion = SIBLoss(window_size=5, backend="cpu").attach(model)
    with FlopCounterMode(display=False) as counter:
        criterion(model(x.clone().requires_grad_().clone()), target).backward()
    counts = counter.get_flop_counts()["Global"]
    assert sum(flops for op, flops in counts.items() if "region_statistics" in str(op)) == 4 * (2 * len(x) * x.numel())
    # Forward, two gradients, and about the same again for the second derivative.
    plain = counted(model.eval(), x.clone().requires_grad_(), backward=True).get_total_flops()
    assert 1.5 * plain < counter.get_total_flops() < 2.5 * plain


def test_every_convolution_is_registered():
    ops = [getattr(torch.ops.sib_fast_convolution, name) for name in dir(torch.ops.sib_fast_convolution)]
    packets = [op for op in ops if isinstance(op, torch._ops.OpOverloadPacket)]
    assert len(packets) >= 2
    assert set(packets) <= set(flop_registry)


def test_an_op_that_is_registered_after_the_counter_was_imported(monkeypatch):
    op = torch.ops.aten.erfinv
    monkeypatch.delitem(flop_registry, op, raising=False)
    monkeypatch.delitem(_flops._FORMULAS, op, raising=False)
    register_flops(op, lambda x, *, out_val: 7 * x.numel())
    with FlopCounterMode(display=False) as counter:
        torch.zeros(3).erfinv()
    assert counter.get_total_flops() == 21
    for table in (flop_registry, _flops._FORMULAS):
        del table[op]


def test_importing_this_package_imports_no_counter():
    """Nor triton, which that one imports; and whoever imports it later has our formulas."""
    code = """
import sys, sib_fast, torch
assert not {"torch.utils.flop_counter", "triton"} & set(sys.modules)
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    sib_fast.prepare(torch.nn.Conv1d(2, 3, 1))(torch.randn(1, 2, 5))
assert counter.get_total_flops() == 60, counter.get_total_flops()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
