"""The layers and `prepare`: the same model, the same numbers, a fused double backward."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import sib_fast

LAYERS = {nn.BatchNorm1d: (6, 4, 5), nn.BatchNorm2d: (6, 4, 5, 5), nn.BatchNorm3d: (4, 4, 2, 3, 3)}


@pytest.mark.parametrize(
    "options", [{}, {"affine": False}, {"momentum": None}, {"track_running_stats": False}, {"momentum": 0.3}], ids=str
)
@pytest.mark.parametrize("layer", LAYERS, ids=lambda c: c.__name__)
def test_layers_are_torchs_in_value_statistics_and_state(layer, options):
    plain = layer(4, **options).double()
    fast = getattr(sib_fast.nn, layer.__name__)(4, **options).double()
    fast.load_state_dict(plain.state_dict())
    for step in range(3):
        x = torch.randn(LAYERS[layer], dtype=torch.float64) * (step + 1) + step
        torch.testing.assert_close(fast(x), plain(x), rtol=1e-12, atol=1e-12)
    for (name, a), (other, b) in zip(fast.state_dict().items(), plain.state_dict().items(), strict=True):
        assert name == other
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=name)
    fast.eval(), plain.eval()
    torch.testing.assert_close(fast(x), plain(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"stride": 2, "padding": 1},
        {"padding": "same"},
        {"padding": "same", "kernel_size": 4, "dilation": 1},
        {"padding": "valid"},
        {"padding": "same", "dilation": (3, 1), "kernel_size": (3, 5)},  # 3 and 2 on each side
        {"padding": 2, "padding_mode": "reflect"},
        {"groups": 4, "dilation": 2},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_convolution_is_torchs_in_value_and_both_derivatives(options):
    plain = nn.Conv2d(4, 8, **{"kernel_size": 3, **options}).double()
    fast = sib_fast.prepare(copy.deepcopy(plain))
    results = []
    for layer in (plain, fast):
        x = torch.randn(2, 4, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
        (first,) = torch.autograd.grad(layer(x).pow(2).sum(), x, create_graph=True)
        results.append([first.detach(), *torch.autograd.grad(first.pow(2).sum(), [x, layer.weight])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-11, atol=1e-11)
    assert torch.equal(fast(x[0]), plain(x[0]))  # an image without a batch
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = fast.float()(x.float())
        assert low.dtype == torch.bfloat16
        assert torch.equal(low, plain.float()(x.float()))
        (first,) = torch.autograd.grad(low.float().pow(2).sum(), x, create_graph=True)
        assert torch.isfinite(torch.autograd.grad(first.pow(2).sum(), fast.weight)[0]).all()
        assert fast.double()(x).dtype == torch.float64


@pytest.mark.parametrize(("layer", "shape"), [(nn.Conv1d, (2, 4, 9)), (nn.Conv3d, (2, 4, 3, 5, 6))], ids=["1d", "3d"])
def test_convolutions_of_other_ranks(layer, shape):
    plain = layer(4, 6, 3, padding="same", groups=2).double()
    fast = sib_fast.prepare(copy.deepcopy(plain))
    assert type(fast) is getattr(sib_fast.nn, layer.__name__)
    results = []
    for module in (plain, fast):
        x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
        (first,) = torch.autograd.grad(module(x).pow(2).sum(), x, create_graph=True)
        results.append([first.detach(), *torch.autograd.grad(first.pow(2).sum(), [x, module.weight])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-11, atol=1e-11)


def test_prepare_keeps_objects_hooks_and_state_and_restore_undoes_it():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    calls, before = [], model[1]
    handle = model[1].register_forward_hook(lambda *_: calls.append(1))
    state, parameters = copy.deepcopy(model.state_dict()), list(model.parameters())
    sib_fast.prepare(model)
    assert model[1] is before
    assert type(model[1]) is sib_fast.nn.BatchNorm2d
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == list(state)
    model(torch.randn(2, 3, 8, 8))
    assert calls == [1]
    handle.remove()  # a local function cannot be pickled
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert type(torch.load(buffer, weights_only=False)[1]) is sib_fast.nn.BatchNorm2d
    sib_fast.restore(model)
    assert type(model[1]) is nn.BatchNorm2d
    with pytest.raises(TypeError, match=r"prepare: model must be a torch\.nn\.Module, got str"):
        sib_fast.prepare("resnet18")


def test_subclasses_are_left_alone():
    class Own(nn.BatchNorm2d):
        pass

    model = sib_fast.prepare(nn.Sequential(Own(3), nn.BatchNorm2d(3)))
    assert [type(m) for m in model] == [Own, sib_fast.nn.BatchNorm2d]


def test_only_the_classes_that_are_asked_for():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    sib_fast.prepare(model, only=(nn.Conv2d, nn.ReLU))
    assert [type(m) for m in model] == [sib_fast.nn.Conv2d, nn.BatchNorm2d, sib_fast.nn.ReLU]
    sib_fast.restore(model)
    assert [type(m) for m in model] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    with pytest.raises(ValueError, match=r"prepare: only must hold classes that sib_fast\.nn has a layer for, got Linear"):
        sib_fast.prepare(model, only=[nn.Linear])


def test_a_compiled_step_is_exact():
    model = sib_fast.prepare(
        nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Softplus(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
        )
    ).double()
    criterion = sib_fast.SIBLoss(1.0, 1e4, window_size=5)
    x, y = torch.randn(6, 3, 12, 12).double(), torch.randint(0, 5, (6,))

    def step(x, y):
        return criterion(model(x), y, x)

    def gradients(function):
        model.zero_grad()
        model[1].reset_running_stats()
        function(x.clone().requires_grad_(), y).backward()
        return [p.grad.clone() for p in model.parameters()], int(model[1].num_batches_tracked)

    want, _ = gradients(step)
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        got, batches = gradients(torch.compile(step, fullgraph=True, backend="aot_eager"))
    base, _ = gradients(lambda x, y: nn.functional.cross_entropy(model(x), y))
    assert batches == 1
    scale = max(w.norm() for w in want)
    for g, w in zip(got, want, strict=True):
        assert (g - w).norm() <= 1e-11 * scale
    # What dropping the second derivative in silence would leave is far outside that bound.
    assert max((w - b).norm() for w, b in zip(want, base, strict=True)) > 1e-8 * scale


@pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed")
@pytest.mark.parametrize("order", ["sharded", "sharded, parametrised", "parametrised, sharded"])
def test_a_layer_that_fsdp2_shards_by_itself_is_swapped_and_back(order):
    """What fully_shard does to a module's class, and parametrize before or after it; with processes: tests/distributed."""
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    layer = nn.Conv2d(3, 4, 3)
    for step in order.split(", "):
        if step == "sharded":
            kind = type(layer)
            layer.__class__ = type(f"FSDP{kind.__name__}", (fsdp.FSDPModule, kind), {"marked": True})
        else:
            nn.utils.parametrizations.weight_norm(layer)
    before, mro = type(layer), [kind.__name__ for kind in type(layer).__mro__]
    x = torch.randn(2, 3, 5, 5)
    y = layer(x)
    sib_fast.prepare(layer)
    assert isinstance(layer, sib_fast.nn.Conv2d)
    assert isinstance(layer, fsdp.FSDPModule)
    assert layer.marked
    assert torch.equal(layer(x), y)
    (swap,) = (entry for entry in sib_fast.nn.inspect(layer).entries if entry.kind.endswith("Conv2d"))
    assert swap.status == "prepared"
    assert not issubclass(before, sib_fast.nn.Conv2d), "it may serve other modules"
    sib_fast.restore(layer)
    assert [kind.__name__ for kind in type(layer).__mro__] == mro
    assert torch.equal(layer(x), y)
