"""prepare(model, recompute=True): the same bits, less memory; what cannot be calculated again is kept."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sib_fast
from sib_fast import _again
from sib_fast.testing.counting import OpLog
from sib_fast.testing.networks import conv_net, image_batch, parameter_gradients

WEIGHTS = {"lambda_fg": 3.0, "lambda_bg": 1000.0, "window_size": 5}
trace_autograd_ops = pytest.mark.skipif(
    not hasattr(torch._dynamo.config, "trace_autograd_ops"), reason="this torch cannot trace torch.autograd.grad"
)


def both(net: nn.Module) -> tuple[nn.Module, nn.Module]:
    return sib_fast.prepare(copy.deepcopy(net)), sib_fast.prepare(copy.deepcopy(net), recompute=True)


def step(net: nn.Module, x: Tensor, target: Tensor) -> dict[str, Tensor]:
    criterion = sib_fast.SIBLoss(**WEIGHTS).attach(net)
    grads = parameter_gradients(criterion(net(x), target), net)
    criterion.remove()
    return grads


def batch_norm_gradients(log: OpLog) -> int:
    return sum("_batch_norm_backward" in name for name, _ in log.ops)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("low", [None, torch.bfloat16], ids=str)
def test_equal_bits_for_one_more_pass_a_batch_norm(layout, low):
    x, target = image_batch()
    x = x.contiguous(memory_format=layout)
    kept, again = both(conv_net().to(memory_format=layout))
    results = []
    for net in (kept, again):
        with torch.autocast(x.device.type, low, enabled=low is not None), OpLog() as log:
            results.append((step(net, x, target), batch_norm_gradients(log)))
    (want, passes), (got, more) = results
    assert passes == 4  # two layers, in the VJP and in the final pass
    assert more == 6
    for name, value in want.items():
        assert torch.equal(got[name], value), name


class Deep(nn.Sequential):
    """Five convolutions with batch norm behind each. Shapes: [N, 3, H, W] -> [N, 5]."""

    def __init__(self, norm: bool = True) -> None:
        torch.manual_seed(0)
        width, layers = 8, []
        for k in range(5):
            layers += [nn.Conv2d(width if k else 3, width, 3, padding=1), nn.BatchNorm2d(width) if norm else nn.Identity()]
            layers += [nn.ReLU(inplace=True)]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5))


def test_nothing_is_calculated_again_that_nobody_reads():
    """Frozen weights need no gradient, which is what the gradient of y was kept for."""
    x, target = image_batch()
    net = sib_fast.prepare(conv_net(), recompute=True)
    for layer in (net[0], net[3]):
        layer.weight.requires_grad_(False)
    criterion = sib_fast.SIBLoss(**WEIGHTS).attach(net)
    with OpLog() as log:
        criterion(net(x), target).backward()
    assert batch_norm_gradients(log) == 4


def bytes_of_the_vjps_graph(net: nn.Module, x: Tensor) -> int:
    """What is alive between the VJP and the final backward pass, of the size of an activation."""
    x = x.clone().requires_grad_()
    logits = net(x)
    with OpLog() as log:
        vjp = sib_fast.vjp_map(logits, x)
        gc.collect()
        held = log.alive(x.shape[0] * 8 * x.shape[2] * x.shape[3] * 4)
    del vjp
    return sum(storage.nbytes() for storage in held)


@pytest.mark.parametrize("norm", [True, False], ids=["batch norm", "none"])
def test_a_gradient_a_convolution_is_not_kept(norm):
    x, _ = image_batch(height=24, width=24)
    kept, again = (bytes_of_the_vjps_graph(net, x) for net in both(Deep(norm)))
    one = x.shape[0] * 8 * 24 * 24 * 4
    assert kept >= 5 * one
    assert kept - again == (5 * one if norm else 0)  # behind no batch norm it is kept as ever


def test_a_second_backward_pass_and_a_vector_of_them():
    x, target = image_batch()
    x = x.double()
    results = []
    for net in both(conv_net().double()):
        criterion = sib_fast.SIBLoss(**WEIGHTS).attach(net)
        loss = criterion(net(x), target)
        parameters = list(net.parameters())
        first = torch.autograd.grad(loss, parameters, retain_graph=True)
        second = torch.autograd.grad(loss, parameters, torch.tensor(-2.0).double())
        results.append([*first, *second])
        for a, b in zip(first, second, strict=True):
            torch.testing.assert_close(b, -2 * a, rtol=1e-9, atol=1e-12)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


class Shared(nn.Module):
    """A convolution's result that a batch norm and a sum read: its gradient comes from two nodes, and is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.body = conv_net()

    def forward(self, x: Tensor) -> Tensor:
        z = self.body[0](x)
        return self.body[2:](self.body[1](z) + z)


@pytest.mark.parametrize("make", [Shared, lambda: conv_net(norm="group")], ids=["two readers", "group norm"])
def test_what_no_batch_norm_made_alone_is_kept(make):
    x, target = image_batch()
    kept, again = both(make())
    with OpLog() as log:
        got = step(again, x, target)
    calculated = batch_norm_gradients(log)
    with OpLog() as log:
        want = step(kept, x, target)
    assert calculated - batch_norm_gradients(log) == (1 if isinstance(again, Shared) else 0)
    for name, value in want.items():
        assert torch.equal(got[name], value), name


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = conv_net()

    def forward(self, x: Tensor) -> Tensor:
        return self.body[4:](checkpoint(self.body[:4], x, use_reentrant=False))


def test_with_activation_checkpointing():
    x, target = image_batch()
    kept, again = both(Checkpointed().double())
    want, got = step(kept, x.double(), target), step(again, x.double(), target)
    for name, value in want.items():
        assert torch.equal(got[name], value), name


@trace_autograd_ops
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_in_one_compiled_region(backend):
    x, target = image_batch()
    x = x.double()
    kept, again = both(conv_net().double())
    want = step(kept, x, target)
    compiled = sib_fast.compile_step(again, sib_fast.SIBLoss(**WEIGHTS), backend=backend)
    compiled(x, target).loss.backward()
    scale = max(value.norm() for value in want.values())
    for name, parameter in again.named_parameters():
        assert (parameter.grad - want[name]).norm() <= 1e-11 * scale, name


def test_the_choice_is_the_modules_and_restore_takes_it_back():
    net = conv_net()
    sib_fast.prepare(net, recompute=True)
    assert net[0].recompute
    assert copy.deepcopy(net)[3].recompute
    assert "recompute" not in net.state_dict()
    sib_fast.prepare(net)
    assert not net[0].recompute
    sib_fast.prepare(net, recompute=True)
    sib_fast.restore(net)
    assert type(net[0]) is nn.Conv2d
    assert not hasattr(net[0], "recompute")


def test_only_a_first_result_is_calculated_again():
    """The offer is of the node's first result: the gradient of a weight, its second, is not taken for it."""
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    weight = torch.ones(3, requires_grad=True)
    y = sib_fast.ops.batch_norm.batch_norm(x, weight, None)[0]
    grad_x, grad_weight = torch.autograd.grad(y.square().sum(), (x, weight), create_graph=True)
    assert _again.calculation_of(grad_weight) is None
    assert _again.calculation_of(x) is None
    again = _again.calculation_of(grad_x)
    assert torch.equal(again(), grad_x)
