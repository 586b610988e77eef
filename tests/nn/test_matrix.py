"""Every layer that `prepare` swaps, in every way that PyTorch runs or differentiates a layer, against PyTorch's own layer.

Equal to 1e-10 in float64, or the same refusal, or a sentence that docs/errors.md explains. A layer that is added to SWAPS without
a row here fails.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import sib_fast
from sib_fast import ops
from sib_fast.nn.prepare import SWAPS

THIRD = "the third derivative exists only with backend='reference'"


class Row(NamedTuple):
    """make: the layer; shape of its input; third: what a third derivative says, None where it is right."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    third: str | None = THIRD


ROWS: dict[type[nn.Module], Row] = {
    nn.BatchNorm1d: Row(lambda: nn.BatchNorm1d(4), (3, 4, 5)),
    nn.BatchNorm2d: Row(lambda: nn.BatchNorm2d(4), (3, 4, 3, 2)),
    nn.BatchNorm3d: Row(lambda: nn.BatchNorm3d(4), (3, 4, 2, 1, 2)),
    nn.SyncBatchNorm: Row(lambda: nn.SyncBatchNorm(4), (3, 4, 5)),  # of one process: BatchNorm; of several: test_sync_batch_norm
    nn.LayerNorm: Row(lambda: nn.LayerNorm(5), (3, 4, 5)),
    nn.GroupNorm: Row(lambda: nn.GroupNorm(2, 4), (3, 4, 3, 2)),
    nn.MultiheadAttention: Row(lambda: nn.MultiheadAttention(4, 2, batch_first=True), (3, 5, 4)),
    nn.Conv1d: Row(lambda: nn.Conv1d(4, 3, 3, padding=1), (3, 4, 5), None),
    nn.Conv2d: Row(lambda: nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=2), (3, 4, 5, 4), None),
    nn.Conv3d: Row(lambda: nn.Conv3d(4, 3, 2), (3, 4, 2, 3, 3), None),
    nn.MaxPool2d: Row(lambda: nn.MaxPool2d(2), (3, 2, 4, 4), None),
    nn.AvgPool2d: Row(lambda: nn.AvgPool2d(2), (3, 2, 4, 4), None),
    nn.ELU: Row(lambda: nn.ELU(0.7), (3, 4)),
    nn.GELU: Row(nn.GELU, (3, 4)),
    nn.Hardsigmoid: Row(nn.Hardsigmoid, (3, 4), None),
    nn.Hardswish: Row(nn.Hardswish, (3, 4)),
    nn.Hardtanh: Row(lambda: nn.Hardtanh(-0.5, 0.7), (3, 4), None),
    nn.LeakyReLU: Row(lambda: nn.LeakyReLU(0.1), (3, 4), None),
    nn.Mish: Row(nn.Mish, (3, 4)),
    nn.ReLU: Row(nn.ReLU, (3, 4), None),
    nn.ReLU6: Row(nn.ReLU6, (3, 4), None),
    nn.Sigmoid: Row(nn.Sigmoid, (3, 4)),
    nn.SiLU: Row(nn.SiLU, (3, 4)),
    nn.Softplus: Row(lambda: nn.Softplus(2.0), (3, 4)),
    nn.Tanh: Row(nn.Tanh, (3, 4)),
}
MATH = partial(sdpa_kernel, SDPBackend.MATH)  # PyTorch's fused attention has no second derivative and no rule for vmap
every_layer = pytest.mark.parametrize("kind", ROWS, ids=lambda kind: kind.__name__)


class HardsigmoidComposed(nn.Module):
    """PyTorch's own has no second derivative, and a float32 sixth in its first."""

    def forward(self, x: Tensor) -> Tensor:
        return (x + 3).clamp(0, 6) / 6


class Net(nn.Module):
    """A layer between two smooth functions, so that every derivative of the whole is none of zeros."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        h = x + 0.1 * x.pow(3)
        h = self.layer(h, h, h, need_weights=False)[0] if isinstance(self.layer, nn.MultiheadAttention) else self.layer(h)
        return h + h.pow(2)


def pair(kind: type[nn.Module], composed: bool = True, train: bool = True) -> tuple[Net, Net]:
    """A network with PyTorch's layer, and with ours."""
    torch.manual_seed(0)
    plain = Net(ROWS[kind].make()).double().train(train)
    if not isinstance(plain.layer, (nn.MultiheadAttention, nn.modules.conv._ConvNd)):  # norms start at ones and zeros
        for parameter in plain.parameters():
            nn.init.normal_(parameter, 0.5)
    fast = sib_fast.prepare(copy.deepcopy(plain))
    assert type(fast.layer) is SWAPS[kind]
    if kind is nn.Hardsigmoid and composed:
        plain.layer = HardsigmoidComposed()
    return plain, fast


def images(kind: type[nn.Module]) -> Tensor:
    return torch.randn(ROWS[kind].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def buffers(net: nn.Module) -> list[Tensor]:
    return [b.clone() for b in net.buffers()]


def derivatives(run: Callable[[Tensor], Tensor], net: nn.Module, x: Tensor, order: int) -> list[Tensor]:
    """Value, and gradients of a scalar of each derivative with respect to x and the parameters."""
    x = x.clone().requires_grad_()
    y = run(x)
    given = [x, *net.parameters()]
    found, scalar = [y], y.sin().sum()
    for n in range(order):
        last = n == order - 1
        grads = torch.autograd.grad(scalar, given, create_graph=not last, allow_unused=True)
        found += [torch.zeros_like(p) if g is None else g for g, p in zip(grads, given, strict=True)]
        scalar = found[1 + n * len(given)].sin().sum() if not last else None
    return [t.detach() for t in (*found, *buffers(net))]


def assert_equal(got: object, want: object) -> None:
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def either(function: Callable[[Net], object], plain: Net, fast: Net) -> None:
    """Both give the same, or both fail with the same words."""
    try:
        want = function(plain)
    except RuntimeError as error:
        said = str(error).splitlines()[0]
        with pytest.raises(RuntimeError, match=re.escape(said)):
            function(fast)
        return
    assert_equal(function(fast), want)


def test_every_layer_has_a_row():
    assert set(ROWS) == set(SWAPS)


@every_layer
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_eager_and_double_backward(kind, train):
    plain, fast = pair(kind, train=train)
    with MATH():
        assert_equal(derivatives(fast, fast, images(kind), 2), derivatives(plain, plain, images(kind), 2))


@every_layer
def test_third_derivative(kind):
    plain, fast = pair(kind)
    if ROWS[kind].third is not None:
        with pytest.raises(NotImplementedError, match=ROWS[kind].third):
            derivatives(fast, fast, images(kind), 3)
        return
    with MATH():
        either(lambda net: derivatives(net, net, images(kind), 3), plain, fast)


@every_layer
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_no_images(kind, train):
    plain, fast = pair(kind, train=train)
    x = images(kind)[:0]
    with MATH():
        assert_equal(derivatives(fast, fast, x, 2), derivatives(plain, plain, x, 2))


@every_layer
def test_deepcopy_and_checkpoint(kind):
    _, fast = pair(kind)
    want = derivatives(fast, copy.deepcopy(fast), images(kind), 1)
    copied = copy.deepcopy(pair(kind)[1])
    assert type(copied.layer) is SWAPS[kind]
    assert_equal(derivatives(copied, copied, images(kind), 1)[: len(want)], derivatives(*[pair(kind)[1]] * 2, images(kind), 1))
    net, other = pair(kind)[1], pair(kind)[1]
    again = derivatives(lambda x: checkpoint(net, x, use_reentrant=False), net, images(kind), 2)
    assert_equal(again, derivatives(other, other, images(kind), 2))


@every_layer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(kind, dtype):
    results = []
    for net in pair(kind, composed=False):
        x = images(kind).float().requires_grad_()
        with torch.autocast("cpu", dtype=dtype):
            y = net.float()(x)
        results.append((y, torch.autograd.grad(y.float().sin().sum(), x)[0]))
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        # What was in half is compared as such: attention adds up in another order than PyTorch's fused kernel.
        wide = torch.float32 if kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention) else torch.float64
        bound = 4 * torch.finfo(dtype).eps if wide is torch.float32 else 1e-5
        torch.testing.assert_close(a, b, rtol=bound, atol=bound * b.abs().max().item())


@every_layer
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_function_transforms(kind, train):
    """vmap(grad) is the per-sample gradient penalty; batch norm that counts has PyTorch's own limits there."""
    plain, fast = pair(kind, composed=False, train=train)
    x, t = images(kind), torch.linspace(-1, 1, images(kind).numel(), dtype=torch.float64).view_as(images(kind))

    def loss(net: Net, parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(net, parameters, (image.unsqueeze(0),)).sin().sum()

    def per_sample(net: Net) -> object:
        parameters = {name: p.detach() for name, p in net.named_parameters()}
        return vmap(grad(lambda p, image: loss(net, p, image)), in_dims=(None, 0))(parameters, x)

    def penalty(net: Net) -> object:
        return vmap(grad(lambda image: net(image.unsqueeze(0)).sin().sum()))(x)

    both = copy.deepcopy((plain, fast))
    if isinstance(fast.layer, nn.modules.batchnorm._NormBase) and train:
        both[0].layer.track_running_stats = both[1].layer.track_running_stats = False
        for net in both:
            net.layer.running_mean = net.layer.running_var = net.layer.num_batches_tracked = None
    with MATH():
        for nets in ((plain, fast), both):
            for function in (per_sample, penalty):
                either(function, *nets)
            either(lambda net: jvp(net, (x,), (t,)), *nets)
            either(lambda net: jacrev(lambda x: net(x).sum(0))(x), *nets)
        either(lambda net: jacfwd(lambda x: net(x).sin().sum())(x), *both)


@every_layer
@pytest.mark.parametrize("needs_grad", [True, False], ids=["with a graph", "without"])
def test_forward_mode(kind, needs_grad):
    def tangent(net: Net) -> list[Tensor]:
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(images(kind).requires_grad_(needs_grad), images(kind).flip(0))
            out = forward_ad.unpack_dual(net(dual))
        assert out.tangent is not None
        assert out.tangent.abs().max() > 1e-3
        return [out.primal.detach(), out.tangent.detach()]

    plain, fast = pair(kind, composed=False)
    with MATH():
        either(tangent, plain, fast)
        either(lambda net: derivatives(net, net, images(kind), 1), *pair(kind))  # and after it the fast layer runs again


@every_layer
def test_functional_call(kind):
    plain, fast = pair(kind)
    for net in (plain, fast):
        net.given = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
    run = {net: lambda x, net=net: functional_call(net, net.given, (x,)) for net in (plain, fast)}
    results = []
    for net in (plain, fast):
        x = images(kind).requires_grad_()
        results.append(torch.autograd.grad(run[net](x).sin().sum(), [x, *net.given.values()]))
    assert_equal(*results)


@every_layer
@pytest.mark.parametrize("batched", [False, True], ids=["one", "several cotangents"])
def test_vectorised_backward(kind, batched):
    """is_grads_batched runs the backward of a fast forward under vmap."""
    results = []
    for net in pair(kind):
        x = images(kind).requires_grad_()
        y = net(x)
        u = torch.stack([y.detach().cos(), y.detach().sin()]) if batched else y.detach().cos()
        results.append(torch.autograd.grad(y, x, u, is_grads_batched=batched)[0])
    assert_equal(*results)


@every_layer
def test_in_place_on_a_view(kind):
    """Only activations can: the rest of the tensor behind the view keeps its gradient."""
    if not hasattr(ROWS[kind].make(), "inplace"):
        pytest.skip("no in-place form")
    results = []
    for net in pair(kind):
        net.layer.inplace = True
        x = images(kind).requires_grad_()
        h = x * 1.5
        if isinstance(net.layer, HardsigmoidComposed):
            h = torch.cat([net.layer(h[:2]), h[2:]])
        else:
            net.layer(h[:2])
        (first,) = torch.autograd.grad(h.sin().sum(), x, create_graph=True)
        results.append([h.detach(), first.detach(), *torch.autograd.grad(first.sin().sum(), x)])
    assert_equal(*results)


@every_layer
def test_exported_and_traced(kind):
    plain, fast = pair(kind, composed=False, train=False)
    x = images(kind)
    exported = torch.export.export(fast, (x,))
    assert not [node for node in exported.graph.nodes if "sib_fast" in str(node.target)]
    assert_equal(exported.module()(x), plain(x))
    traced = torch.fx.symbolic_trace(fast)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["layer"]
    assert_equal(traced(x), plain(x))


CALLS: dict[str, Callable[[Tensor], object]] = {
    "activation": lambda x: ops.activation.activation(x, "silu"),
    "activation in place": lambda x: ops.activation.activation(x + 0, "relu", inplace=True),
    "batch_norm": lambda x: ops.batch_norm.batch_norm(x)[0],
    "running_batch_norm": lambda x: ops.batch_norm.running.running_batch_norm(x, None, None, x[0, :, 0, 0], x[0, :, 0, 0], 1e-5),
    "layer_norm": lambda x: ops.layer_norm.layer_norm(x, (4,)),
    "group_norm": lambda x: ops.layer_norm.group_norm(x, 1),
    "softmax": lambda x: ops.softmax.softmax(x),
    "max_pool2d": lambda x: ops.pooling.max_pool2d(x, [2, 2], [2, 2], [0, 0], [1, 1], False),
    "avg_pool2d": lambda x: ops.pooling.avg_pool2d(x, [2, 2], [2, 2], [0, 0], False, True, None),
    "convolution": lambda x: ops.convolution.convolution(x, x[:, :, :1, :1], None, [1, 1], [0, 0], [1, 1], 1),
    "foreground_mask": lambda x: ops.foreground_mask(x, window_size=3),
    "region_statistics": lambda x: ops.region_statistics(x, x, x[:, :1]),
}


@pytest.mark.parametrize("name", CALLS)
def test_an_op_that_is_called_directly_refuses(name):
    x = torch.rand(3, 3, 4, 4, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match=r"must not be used inside torch\.func transforms or forward-mode AD"):
        jvp(CALLS[name], (x,), (x,))
    with pytest.raises(NotImplementedError, match=r"must not be used"):
        grad(lambda x: CALLS[name](x).sum())(x)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=r"must not be used"):
        CALLS[name](forward_ad.make_dual(x, x))
    CALLS[name](x)


@pytest.mark.parametrize("name", ["silu", "relu"])
def test_the_reference_has_every_rule(name):
    x = torch.rand(3, 3, 4, 4, dtype=torch.float64)
    own = getattr(nn.functional, name)
    assert_equal(
        jvp(lambda x: ops.activation.activation(x, name, backend="reference"), (x,), (x,)),
        jvp(own, (x,), (x,)),
    )
