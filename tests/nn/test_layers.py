"""Every layer of `sib_fast.nn` in a whole S-IB step: eager, compiled, checkpointed, in place, in every layout."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import sib_fast
from sib_fast import _backends, network_checks
from sib_fast.nn.prepare import SWAPS, plain_class
from sib_fast.testing.counting import OpLog

trace_autograd_ops = pytest.mark.skipif(
    not hasattr(torch._dynamo.config, "trace_autograd_ops"), reason="this torch cannot trace torch.autograd.grad"
)
ACTIVATIONS = {
    "ReLU": nn.ReLU(),
    "ReLU-in-place": nn.ReLU(inplace=True),
    "ReLU6-in-place": nn.ReLU6(inplace=True),
    "Hardtanh": nn.Hardtanh(-0.5, 0.7),
    "LeakyReLU": nn.LeakyReLU(0.1),
    "LeakyReLU-negative": nn.LeakyReLU(-0.1),
    "Hardsigmoid": nn.Hardsigmoid(),
    "Hardswish-in-place": nn.Hardswish(inplace=True),
    "Sigmoid": nn.Sigmoid(),
    "Tanh": nn.Tanh(),
    "SiLU": nn.SiLU(),
    "SiLU-in-place": nn.SiLU(inplace=True),
    "GELU": nn.GELU(),
    "GELU-tanh": nn.GELU("tanh"),
    "Mish": nn.Mish(),
    "ELU": nn.ELU(0.7),
    "Softplus": nn.Softplus(2.0),
}
POOLS = {"max": nn.MaxPool2d(3, 2, 1), "average": nn.AvgPool2d(2)}


def network(activation: nn.Module, pool: nn.Module | None = None) -> nn.Sequential:
    """A strided first layer (phases), a depthwise and an ordinary convolution, batch norm, the activation before and after."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=2, padding=2, bias=False),
        nn.BatchNorm2d(8),
        copy.deepcopy(activation),
        copy.deepcopy(pool) if pool is not None else nn.Identity(),
        nn.Conv2d(8, 8, 3, padding="same", groups=8),
        nn.BatchNorm2d(8),
        copy.deepcopy(activation),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 5),
    ).double()


def batch():
    draw = torch.Generator().manual_seed(1)
    return torch.randn(6, 3, 20, 20, generator=draw).double(), torch.randint(0, 5, (6,), generator=draw)


def gradients(net, step=None):
    """Parameter gradients of one S-IB step (or of step), and the buffers after it."""
    net, (x, y) = copy.deepcopy(net), batch()
    criterion = sib_fast.SIBLoss(1.0, 1e4, window_size=5)
    step = step or (lambda net, x, y: criterion(net(x), y, x))
    step(net, x.requires_grad_(), y).backward()
    return [p.grad for p in net.parameters()], list(net.buffers())


def assert_same(got, want, base, bound=1e-11):
    """Equal to bound, where leaving out the second-order part would be 1,000 times further away at least."""
    scale = max(w.norm() for w in want)
    assert max((w - b).norm() for w, b in zip(want, base, strict=True)) > 1e3 * bound * scale
    for g, w in zip(got, want, strict=True):
        assert (g - w).norm() <= bound * scale


def base_loss(net, x, y):
    return nn.functional.cross_entropy(net(x), y)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_prepared_step_is_the_plain_one(name, pool, layout):
    plain = network(ACTIVATIONS[name], POOLS[pool]).to(memory_format=layout)
    fast = sib_fast.prepare(copy.deepcopy(plain))
    left = [type(m).__name__ for m in fast.modules() if type(m) in SWAPS]
    assert left == []
    if name == "Hardsigmoid":  # PyTorch's cannot: its formula in ops that can
        plain[2] = plain[6] = type("Own", (nn.Module,), {"forward": lambda self, x: (x + 3).clamp(0, 6) / 6})()
    (want, buffers), (base, _) = gradients(plain), gradients(plain, base_loss)
    got, got_buffers = gradients(fast)
    assert_same(got, want, base)
    for a, b in zip(got_buffers, buffers, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["GELU", "GELUTanh"])
def test_timms_gelu_too(name):
    """timm's ConvNeXt is full of it, and it is no subclass of torch.nn's."""
    kind = getattr(pytest.importorskip("timm.layers.activations", exc_type=ImportError), name)
    plain = network(kind())
    fast = sib_fast.prepare(copy.deepcopy(plain))
    assert isinstance(fast[2], kind)
    x = torch.randn(2, 3, requires_grad=True)
    assert any("sib_fast" in node.name() for node in network_checks.nodes_of(fast[2](x).grad_fn))
    (want, _), (base, _) = gradients(plain), gradients(plain, base_loss)
    assert_same(gradients(fast)[0], want, base)
    buffer = io.BytesIO()
    torch.save(fast, buffer)
    buffer.seek(0)
    assert type(torch.load(buffer, weights_only=False)[2]) is type(fast[2])
    assert type(sib_fast.restore(fast)[2]) is kind


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("options", [{"act_layer": "silu"}, {"apply_act": False}, {"drop_layer": nn.Dropout}], ids=str)
def test_timms_batch_norm_with_its_activation(options, training):
    """What timm's EfficientNets are made of."""
    kind = pytest.importorskip("timm.layers.norm_act", exc_type=ImportError).BatchNormAct2d
    plain = network(nn.Identity()).train(training)
    plain[1] = kind(8, **options).double().train(training)
    plain[1].running_var.fill_(0.3)
    fast = sib_fast.prepare(copy.deepcopy(plain))
    assert isinstance(fast[1], kind)
    assert plain_class(type(fast[1])) is kind
    assert type(fast[1].act) not in SWAPS
    x = torch.randn(2, 8, 3, 3, dtype=torch.float64, requires_grad=True)
    assert any("sib_fast" in node.name() and "batch_norm" in node.name() for node in network_checks.nodes_of(fast[1](x).grad_fn))
    fast = sib_fast.prepare(copy.deepcopy(plain))  # that forward moved the statistics

    def step(net, x, y):
        torch.manual_seed(2)  # of the dropout
        return sib_fast.SIBLoss(1.0, 1e4, window_size=5, train_in_eval_mode=True)(net(x), y, x)

    (want, buffers), (base, _) = gradients(plain, step), gradients(plain, lambda *a: torch.manual_seed(2) and base_loss(*a))
    got, got_buffers = gradients(fast, step)
    assert_same(got, want, base)
    for a, b in zip(got_buffers, buffers, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    buffer = io.BytesIO()
    torch.save(fast, buffer)
    buffer.seek(0)
    assert type(torch.load(buffer, weights_only=False)[1]) is type(fast[1])
    assert type(sib_fast.restore(fast)[1]) is kind


def test_pytorchs_hardsigmoid_cannot():
    """If it ever can, the note in the README goes."""
    x = torch.randn(4, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(nn.Hardsigmoid()(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="derivative for aten::hardsigmoid_backward is not implemented"):
        slope.sum().backward()


@pytest.mark.sampled(5)
@trace_autograd_ops
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize(
    "name",
    [
        "ReLU",
        "ReLU-in-place",
        "ReLU6-in-place",
        "LeakyReLU",
        "SiLU-in-place",
        "Hardswish-in-place",
        "Hardsigmoid",
        "GELU",
        "Sigmoid",
    ],
)
def test_a_compiled_step_is_exact(name, pool):
    net = sib_fast.prepare(network(ACTIVATIONS[name], POOLS[pool]))
    criterion = sib_fast.SIBLoss(1.0, 1e4, window_size=5)
    (want, buffers), (base, _) = gradients(net), gradients(net, base_loss)

    def compiled(net, x, y):
        torch._dynamo.reset()
        return torch.compile(lambda x, y: criterion(net(x), y, x), fullgraph=True, backend="aot_eager")(x, y)

    with torch._dynamo.config.patch(trace_autograd_ops=True):
        got, got_buffers = gradients(net, compiled)
    assert_same(got, want, base)
    for a, b in zip(got_buffers, buffers, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.sampled(2)
@trace_autograd_ops
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", ["ReLU-in-place", "ReLU6-in-place", "SiLU-in-place"])
def test_compile_step_takes_activations_in_place(name, layout):
    """They have an autograd.Function behind a registered op, which is not one of the user's."""
    net = sib_fast.prepare(network(ACTIVATIONS[name])).to(memory_format=layout)
    (want, _), (base, _) = gradients(net), gradients(net, base_loss)

    def compiled(net, x, y):
        step = sib_fast.compile_step(net, sib_fast.SIBLoss(1.0, 1e4, window_size=5), backend="aot_eager")
        return step(x.detach().contiguous(memory_format=layout), y).loss

    assert_same(gradients(net, compiled)[0], want, base)


class Checkpointed(nn.Module):
    def __init__(self, body: nn.Sequential) -> None:
        super().__init__()
        self.body = body

    def forward(self, x):
        return self.body[6:](checkpoint(self.body[:6], x, use_reentrant=False))


def test_checkpointing_counts_a_batch_once():
    net = sib_fast.prepare(network(nn.ReLU(inplace=True)))
    (want, buffers), (base, _) = gradients(net), gradients(net, base_loss)
    got, got_buffers = gradients(Checkpointed(net))
    assert_same(got, want, base)
    for a, b in zip(got_buffers, buffers, strict=True):
        assert torch.equal(a, b)
    plain = Checkpointed(network(nn.ReLU(inplace=True)))
    assert int(gradients(plain)[1][2]) > 1, "PyTorch's counts once too: is the check still needed?"
    # A forward of its own after a backward counts again.
    x, _ = batch()
    for expected in (1, 2):
        net(x).sum().backward()
        assert int(net[1].num_batches_tracked) == expected


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(4), nn.ReLU(), nn.SiLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3)], ids=str)
def test_without_grad_and_in_inference_mode(layer):
    x = torch.randn(2, 4, 6, 6)
    fast = sib_fast.prepare(copy.deepcopy(layer))
    evaluated, want = copy.deepcopy(layer).eval()(x), layer(x)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(sib_fast.prepare(copy.deepcopy(layer))(x), want)
    fast.eval()
    torch.testing.assert_close(fast(x), evaluated)


def frozen(affine: bool = True) -> nn.Sequential:
    """A training network whose batch norms are in eval mode, as in fine-tuning."""
    plain = network(nn.SiLU())
    plain[1] = nn.BatchNorm2d(8, affine=affine).double()
    for layer in (plain[1], plain[5]):
        nn.init.normal_(layer.running_mean)
        layer.running_var.uniform_(0.5, 2)
        layer.eval()
    return plain


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_frozen_statistics_in_a_training_step(affine, layout):
    plain = frozen(affine).to(memory_format=layout)
    (want, buffers), (base, _) = gradients(plain), gradients(plain, base_loss)
    fast = sib_fast.prepare(copy.deepcopy(plain))
    for net in (fast, Checkpointed(fast)):
        got, got_buffers = gradients(net)
        assert_same(got, want, base)
        assert all(torch.equal(a, b) for a, b in zip(got_buffers, buffers, strict=True))


@trace_autograd_ops
def test_frozen_statistics_in_a_compiled_step():
    net = sib_fast.prepare(frozen())
    criterion = sib_fast.SIBLoss(1.0, 1e4, window_size=5)
    (want, _), (base, _) = gradients(net), gradients(net, base_loss)

    def compiled(net, x, y):
        torch._dynamo.reset()
        return sib_fast.compile_step(net, criterion, backend="aot_eager")(x, y).loss

    assert_same(gradients(net, compiled)[0], want, base)


def test_what_frozen_statistics_cost():
    """One op each, forward, VJP and its gradient: what they read of x's size. PyTorch composes the last."""
    x = torch.randn(2, 64, 16, 16)
    ops = {}
    for layer in (nn.BatchNorm2d(64).eval(), sib_fast.nn.BatchNorm2d(64).eval()):
        leaf, counts = x.clone().requires_grad_(), []
        cotangent = torch.ones_like(x).requires_grad_()
        with OpLog() as log:
            y = layer(leaf)
        counts.append(log)
        with OpLog() as log:
            (vjp,) = torch.autograd.grad(y, leaf, cotangent, create_graph=True)
        counts.append(log)
        with OpLog() as log:
            torch.autograd.grad(vjp, [cotangent, layer.weight], torch.ones_like(x))
        counts.append(log)
        read = [[(name, shapes.count(x.shape)) for name, shapes in log.ops if x.shape in shapes] for log in counts]
        ops[type(layer)] = [[count for name, count in of if "detach" not in name and "_like" not in name] for of in read]
    assert ops[sib_fast.nn.BatchNorm2d] == [[1], [1], [2]]
    assert len(ops[nn.BatchNorm2d][2]) > 5


def test_where_the_statistics_are_given_and_nothing_is_gained_the_layer_is_pytorchs():
    x = torch.randn(3, 4, 5, 5)
    layer = sib_fast.nn.BatchNorm2d(4).eval()
    with torch.no_grad(), OpLog() as log:
        layer(x)
    assert not any("sib_fast" in name for name, _ in log.ops)


@pytest.mark.parametrize("cls", [nn.BatchNorm2d, nn.SyncBatchNorm], ids=lambda c: c.__name__)
@pytest.mark.parametrize("tracks", [True, False])
def test_eval_mode_follows_its_statistics(tracks, cls):
    """Without running statistics eval mode takes the batch's, as PyTorch's; with them it changes none."""
    x = torch.randn(5, 4, 3, 6, dtype=torch.float64, requires_grad=True)
    plain = nn.BatchNorm2d(4, track_running_stats=tracks).double()
    ours = sib_fast.prepare(cls(4, track_running_stats=tracks)).double()
    results = []
    for layer in (plain, ours):
        layer(x)
        layer.eval()
        y = layer(x)
        (vjp,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        results.append([y, vjp, *torch.autograd.grad(vjp.square().sum(), [x, layer.weight])])
        results[-1] += list(layer.buffers())
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    assert ("running" in y.grad_fn.name()) == tracks


@pytest.mark.parametrize("plain", SWAPS, ids=lambda c: c.__name__)
def test_every_swap_has_its_namesake_and_returns(plain):
    assert SWAPS[plain].__name__ == plain.__name__
    assert issubclass(SWAPS[plain], plain)
    assert getattr(sib_fast.nn, plain.__name__) is SWAPS[plain]
    assert plain.__name__ in sib_fast.nn.__all__


def test_where_batch_norm_has_no_kernel_the_layer_is_pytorchs(monkeypatch):
    """Composed of plain operations, the reference would be slower than what it replaces; nothing warns."""
    for name, device in _backends.KERNEL_DEVICES.items():
        if device == "cpu":
            monkeypatch.setitem(_backends.MISSING, name, "it was not built")
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    plain, ours = nn.BatchNorm2d(3).double(), sib_fast.nn.BatchNorm2d(3).double()
    got, want = ours(x), plain(x)
    assert type(got.grad_fn) is type(want.grad_fn)
    assert torch.equal(got, want)
    assert torch.equal(ours.running_var, plain.running_var)
    assert ours.num_batches_tracked == 1
