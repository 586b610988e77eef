"""SIBLoss.attach(model, layer=...): S-IB at a feature map, against the explicit form on the network cut in two."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import sib_fast
from sib_fast import SIBLoss
from sib_fast.masks import DensityMask, GivenMask
from sib_fast.testing.networks import image_batch, parameter_gradients

WEIGHTS = {"lambda_fg": 3.0, "lambda_bg": 100.0}


class Net(nn.Module):
    """A stem, a body and a head, so that the feature maps have names. Shapes: [N, 3, H, W] -> [N, 5]."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.GroupNorm(2, 6), nn.SiLU())
        self.body = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU())
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5))
        with torch.no_grad():
            self.head[-1].weight.mul_(3.0)

    def forward(self, x):
        return self.head(self.body(self.stem(x)))


def problem(dtype=torch.float64):
    x, target = image_batch(height=24, width=20)
    return x.to(dtype), target


def explicit(net, x, target, window_size, mask=None, **options):
    """The explicit form at the stem's output: the network cut in two by hand."""
    features = net.stem(x)
    loss = SIBLoss(**WEIGHTS, window_size=window_size, **options)(net.head(net.body(features)), target, features, mask)
    return loss, parameter_gradients(loss, net)


def assert_same(got, wanted):
    assert torch.equal(got[0], wanted[0])
    for name, value in wanted[1].items():
        assert torch.equal(got[1][name], value), name


@pytest.mark.parametrize("layer", ["stem", "stem.2", "module"])
def test_equals_the_explicit_form(layer):
    x, target = problem()
    net = Net().double()
    criterion = SIBLoss(**WEIGHTS, window_size=9).attach(net, net.stem if layer == "module" else layer)
    loss = criterion(net(x), target)
    assert_same((loss, parameter_gradients(loss, net)), explicit(Net().double(), x, target, window_size=5))  # 9 · 10/20 ≈ 5
    assert criterion.terms["foreground"] > 0


def test_it_is_another_loss_than_the_inputs():
    x, target = problem()
    net = Net().double()
    at_input = SIBLoss(**WEIGHTS, window_size=9).attach(net)(net(x), target)
    net = Net().double()
    at_layer = SIBLoss(**WEIGHTS, window_size=9).attach(net, "stem")(net(x), target)
    assert abs(at_input - at_layer) > 1e-3


@pytest.mark.parametrize(
    ("window", "image", "feature", "scaled"),
    [(31, (224, 224), (56, 56), 7), (31, (224, 224), (28, 28), 3), (31, (224, 224), (14, 14), 1), (31, (224, 224), (7, 7), 1),
     (31, (224, 224), (112, 112), 15), (9, (24, 20), (12, 10), 5), (7, (32, 32), (32, 32), 7)],
)  # fmt: skip
def test_the_window_covers_the_same_share(window, image, feature, scaled):
    assert DensityMask(window).scaled(image, feature).window_size == scaled


def test_only_the_network_above_is_differentiated_twice():
    """Counted: convolutions of the stem run forward and backward once, as in a plain step."""

    class Convolutions(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "convolution" in func.name():
                self.seen.append((func.name(), tuple(tuple(a.shape) for a in args if isinstance(a, torch.Tensor))))
            return func(*args, **(kwargs or {}))

    def of_the_stem(criterion, net):
        x, target = problem(torch.float32)
        with Convolutions() as counted:
            criterion(net(x), target).backward()
        return [call for call in counted.seen if (6, 3, 3, 3) in call[1]]

    net = Net()
    plain = of_the_stem(nn.CrossEntropyLoss(), net)
    assert len(plain) == 2
    assert of_the_stem(SIBLoss(**WEIGHTS).attach(net, "stem"), net) == plain
    net = Net()
    assert len(of_the_stem(SIBLoss(**WEIGHTS).attach(net), net)) > 2


def test_given_masks_of_the_image_are_averaged_down():
    x, target = problem()
    given = (torch.rand(6, 1, 24, 20, generator=torch.Generator().manual_seed(0)) > 0.5).double()
    net = Net().double()
    loss = SIBLoss(**WEIGHTS).attach(net, "stem")(net(x), target, mask=given)
    small = F.avg_pool2d(given, 2)
    assert_same((loss, parameter_gradients(loss, net)), explicit(Net().double(), x, target, 31, small))
    net = Net().double()
    loss = SIBLoss(**WEIGHTS).attach(net, "stem")(net(x), target, mask=small)  # of the map's own size
    assert_same((loss, parameter_gradients(loss, net)), explicit(Net().double(), x, target, 31, small))
    annotated = torch.tensor([True, False] * 3)
    net = Net().double()
    loss = SIBLoss(**WEIGHTS, window_size=9).attach(net, "stem")(net(x), target, mask=GivenMask(given, annotated))
    assert_same((loss, parameter_gradients(loss, net)), explicit(Net().double(), x, target, 5, GivenMask(small, annotated)))


@pytest.mark.parametrize("prepared", [False, True])
def test_a_frozen_network_below(prepared):
    """Nothing below the layer requires grad: the map becomes a leaf, and the head still trains."""
    x, target = problem()
    net = Net().double()
    net.stem.requires_grad_(False)
    if prepared:
        sib_fast.prepare(net)
    loss = SIBLoss(**WEIGHTS, window_size=9).attach(net, "stem")(net(x), target)
    loss.backward()
    _, wanted = explicit(Net().double(), x, target, 5)
    for name, parameter in net.named_parameters():
        if name.startswith("stem"):
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-9, atol=1e-12)


def test_the_feature_map_is_released():
    x, target = problem()
    net = Net().double()
    seen = []
    net.body.register_forward_pre_hook(lambda module, args: seen.append(weakref.ref(args[0])))
    criterion = SIBLoss(**WEIGHTS).attach(net, "stem")
    loss = criterion(net(x), target)
    loss.backward()
    del loss
    gc.collect()
    assert seen[0]() is None
    with pytest.raises(RuntimeError, match="a feature map serves one loss"):
        criterion(torch.randn(6, 5, requires_grad=True), target)


def test_steps_validation_and_removal():
    x, target = problem()
    net = Net().double()
    criterion = SIBLoss(**WEIGHTS).attach(net, "stem")
    for _ in range(2):
        criterion(net(x), target).backward()
    net.eval()
    with torch.inference_mode():
        assert torch.equal(criterion(net(x), target), F.cross_entropy(net(x), target))
    net.train()
    criterion(net(x), target).backward()
    criterion.remove()
    assert not net._forward_pre_hooks
    assert not net.stem._forward_hooks
    assert pickle.loads(pickle.dumps(net))(x).shape == (6, 5)


def test_a_forward_pass_without_a_loss_is_forgotten():
    x, target = problem()
    net = Net().double()
    criterion = SIBLoss(**WEIGHTS, window_size=9).attach(net, "stem")
    net(x.flip(0))
    loss = criterion(net(x), target)
    assert_same((loss, parameter_gradients(loss, net)), explicit(Net().double(), x, target, window_size=5))


def test_copies_carry_no_live_hook():
    x, _ = problem()
    net = Net().double()
    criterion = SIBLoss(**WEIGHTS).attach(net, "stem")
    other = copy.deepcopy(net)
    net(x)
    captured = criterion._attachment.input.captured()
    other(x)
    assert criterion._attachment.input.captured() is captured


def test_under_checkpointing():
    class Recomputed(Net):
        def forward(self, x):
            return self.head(checkpoint(lambda v: self.body(self.stem(v)), x, use_reentrant=False))

    x, target = problem()
    net = Recomputed().double()
    loss = SIBLoss(**WEIGHTS, window_size=9).attach(net, "body.0")(net(x), target)
    got = parameter_gradients(loss, net)
    plain = Net().double()
    wanted = parameter_gradients(SIBLoss(**WEIGHTS, window_size=9).attach(plain, "body.0")(plain(x), target), plain)
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-14)


def test_under_ddp(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        x, target = problem()
        net = Net().double()
        model = DistributedDataParallel(net)
        loss = SIBLoss(**WEIGHTS, window_size=9).attach(model, "stem")(model(x), target)
        assert_same((loss, parameter_gradients(loss, net)), explicit(Net().double(), x, target, 5))
    finally:
        torch.distributed.destroy_process_group()


def test_autocast():
    x, target = problem(torch.float32)
    net = Net()
    criterion = SIBLoss(**WEIGHTS, window_size=9).attach(net, "stem")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = criterion(net(x), target)
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())


def test_what_would_fail_is_refused_in_words():
    net = Net()
    for layer in ("stem.9", nn.Conv2d(3, 3, 1), net, ""):
        with pytest.raises(ValueError, match=r"layer must be one of the model's modules, got .*; its first level: stem, body"):
            SIBLoss().attach(net, layer)
    x, _ = problem(torch.float32)
    criterion = SIBLoss(**WEIGHTS).attach(net, "head")
    with pytest.raises(RuntimeError, match=r"the attached layer must return a floating-point \[N, C, H, W\] tensor, got"):
        net(x)
    criterion.remove()

    class Twice(Net):
        def forward(self, x):
            return self.head(self.body(self.stem(x)) + self.body(self.stem(x)))

    net = Twice()
    criterion = SIBLoss(**WEIGHTS).attach(net, "stem")
    with pytest.raises(RuntimeError, match="must run once in a forward pass, got a second call"):
        net(x)
    net = Net()
    criterion = SIBLoss(**WEIGHTS).attach(net, "stem")
    with pytest.raises(RuntimeError, match="criterion must be attached to the model's input or to none, got one"):
        sib_fast.compile_step(net, criterion)
