"""explain: each method against its formula in plain torch, and the promise that the model is left alone."""

from __future__ import annotations

import copy
import functools
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("captum", reason="extra [explain]", exc_type=ImportError)
pytest.importorskip("pytorch_grad_cam", reason="extra [explain]", exc_type=ImportError)

import sib_fast
from sib_fast.explain import METHODS, REPORTED, UndefinedMethodError, explain, find_layer
from sib_fast.testing.networks import image_batch


class Net(nn.Module):
    """Convolutions with batch norm and in-place ReLU, and a head: what the methods know how to hook. [N, 3, H, W] -> [N, 5]."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.body = nn.Sequential(nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.BatchNorm2d(12), nn.ReLU(inplace=True))
        self.head = nn.Linear(12, 5)
        self.stem[1].running_mean.normal_(std=0.1)
        self.body[1].running_var.uniform_(0.5, 1.5)

    def features(self, x):
        return self.body(self.stem(x))

    def forward(self, x):
        return self.head(self.features(x).mean(dim=(2, 3)))


def problem():
    x, target = image_batch(images=4, height=16, width=14)
    return Net(), x, target


def gradient(net, x, target):
    """∂ logit of the class / ∂x, in eval mode."""
    net = copy.deepcopy(net).eval()
    x = x.clone().requires_grad_()
    return torch.autograd.grad(net(x).gather(1, target[:, None]).sum(), x)[0]


def cam_parts(net, x, target):
    net = copy.deepcopy(net).eval()
    features = net.features(x)
    logits = net.head(features.mean(dim=(2, 3)))
    (grads,) = torch.autograd.grad(logits.gather(1, target[:, None]).sum(), features)
    return features.detach(), grads


def upsampled(cam, x):
    return F.interpolate(cam.relu(), x.shape[2:], mode="bilinear", align_corners=False)


CAMS = tuple(method for method in METHODS if "cam" in method)


def by_formula(method, net, x, target):
    if method == "saliency":
        return gradient(net, x, target).abs().amax(1, keepdim=True)
    if method == "input_x_gradient":
        return (gradient(net, x, target) * x).sum(1, keepdim=True).abs()
    if method == "integrated_gradients":
        nodes, weights = (torch.tensor(v, dtype=torch.float32) for v in _gauss_legendre(32))
        total = sum(w * gradient(net, a * x, target) for a, w in zip(nodes, weights, strict=True))
        return (total * x).sum(1, keepdim=True).abs()
    if method == "guided_backprop":
        net = copy.deepcopy(net).eval()
        relu, gate = net.body[2], net.stem[2]
        relu.inplace = gate.inplace = False
        for module in (relu, gate):
            module.register_full_backward_hook(lambda m, grads, out: (grads[0].relu(),))
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(net(leaf).gather(1, target[:, None]).sum(), leaf)[0].abs().amax(1, keepdim=True)
    a, g = cam_parts(net, x, target)
    if method == "grad_cam":
        return upsampled((g.mean((2, 3), keepdim=True) * a).sum(1, keepdim=True), x)
    if method == "layer_cam":
        return upsampled((g.relu() * a).sum(1, keepdim=True), x)
    if method == "grad_cam_plusplus":
        alpha = g**2 / (2 * g**2 + a.sum((2, 3), keepdim=True) * g**3 + 1e-6)
        alpha = torch.where(g != 0, alpha, 0.0)
        return upsampled(((g.relu() * alpha).sum((2, 3), keepdim=True) * a).sum(1, keepdim=True), x)
    raise AssertionError(method)


def _gauss_legendre(steps):
    import numpy

    nodes, weights = numpy.polynomial.legendre.leggauss(steps)
    return (nodes + 1) / 2, weights / 2


@pytest.mark.parametrize("method", [m for m in METHODS if m != "smoothgrad"])
def test_equals_the_formula(method):
    net, x, target = problem()
    got, want = explain(net, x, target, method), by_formula(method, net, x, target)
    assert got.shape == (4, 1, 16, 14)
    assert got.dtype == torch.float32
    assert want.abs().max() > 0
    torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-5 * want.abs().max().item())


def test_smoothgrad_averages_gradients_of_noisy_images():
    net, x, target = problem()
    exact = explain(net, x, target, "saliency")
    torch.testing.assert_close(explain(net, x, target, "smoothgrad", noise=1e-7), exact, rtol=1e-3, atol=1e-5)
    noisy = explain(net, x, target, "smoothgrad", n_samples=64)
    state = torch.random.get_rng_state()
    assert torch.equal(explain(net, x, target, "smoothgrad", n_samples=64), noisy)  # seeded
    assert torch.equal(torch.random.get_rng_state(), state)  # and the caller's generator is left alone
    want = torch.zeros_like(x)
    generator = torch.Generator().manual_seed(7)
    spread = 0.15 * (x.amax((1, 2, 3)) - x.amin((1, 2, 3)))[:, None, None, None]
    for _ in range(512):
        want += gradient(net, x + spread * torch.randn(x.shape, generator=generator), target) / 512
    want = want.abs().amax(1, keepdim=True)
    assert (noisy - want).norm() < 0.3 * want.norm()
    assert (noisy - want).norm() < 0.7 * (exact - want).norm()


@pytest.mark.parametrize("method", METHODS)
def test_a_prepared_network_is_explained_as_the_plain_one(method):
    net, x, target = problem()
    want = explain(net, x, target, method)
    prepared = sib_fast.prepare(copy.deepcopy(net))
    classes = [type(module) for module in prepared.modules()]
    assert torch.equal(explain(prepared, x, target, method), want)
    assert [type(module) for module in prepared.modules()] == classes


@pytest.mark.parametrize("method", METHODS)
def test_the_libraries_see_the_layers_of_torch_alone(method, monkeypatch):
    """They find layers by class: today's Captum also takes a subclass of nn.ReLU, which is nobody's promise."""
    net, x, target = problem()
    prepared = sib_fast.prepare(copy.deepcopy(net))
    swapped = {type(module) for module in prepared.modules()} - {type(module) for module in net.modules()}
    assert {sib_fast.nn.ReLU, sib_fast.nn.Conv2d, sib_fast.nn.BatchNorm2d} <= swapped
    compute, seen = METHODS[method], []

    def look(model, *arguments, **options):
        seen.extend(type(module) for module in model.modules())
        return compute(model, *arguments, **options)

    monkeypatch.setitem(METHODS, method, look)
    explain(prepared, x, target, method)
    assert seen == [type(module) for module in net.modules()]


class Shared(nn.Module):
    """One ReLU after every convolution: a CAM of it is one of its last output, which the pooling sees. [N, 3, H, W] -> [N, 5]."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(8, 5)

    def features(self, x):
        return self.relu(self.second(self.relu(self.first(x))))

    def forward(self, x):
        return self.head(self.features(x).mean(dim=(2, 3)))


@pytest.mark.parametrize("method", CAMS)
def test_a_layer_that_runs_several_times_counts_by_its_last_output(method):
    _, x, target = problem()
    net = Shared()
    got, want = explain(net, x, target, method, layer="relu"), by_formula(method, net, x, target)
    assert want.abs().max() > 0
    torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-5 * want.abs().max().item())


def test_the_layer_that_is_found_runs_once():
    _, x, target = problem()
    net = Shared()
    assert find_layer(net, x[:1]) is net.second
    assert torch.equal(explain(net, x, target, "grad_cam"), explain(net, x, target, "grad_cam", layer="second"))
    with pytest.raises(UndefinedMethodError, match=r"got None and no module that runs once returns \[N, C, H, W\]"):
        find_layer(nn.Sequential(net.relu, net.relu, nn.Flatten()), x[:1])


def test_the_layer_of_timms_efficientnet_lite():
    """Its activations are one module, which finishes last before the pooling."""
    timm = pytest.importorskip("timm", exc_type=ImportError)
    net = timm.create_model("efficientnet_lite0", num_classes=5).train()
    state = copy.deepcopy(net.state_dict())
    runs = []
    layer = find_layer(net, torch.randn(1, 3, 64, 64))
    assert net.training
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())  # no statistics were updated
    handle = layer.register_forward_hook(lambda *_: runs.append(1))
    net(torch.randn(2, 3, 64, 64))
    handle.remove()
    assert len(runs) == 1
    assert next(name for name, module in net.named_modules() if module is layer).startswith(("bn2", "conv_head"))


# ---- models as they stand in a process ----------------------------------------------------------------------------------


class Keeps(Net):
    """Keeps a feature map of its last forward pass."""

    def forward(self, x):
        self.map = self.features(x)
        return self.head(self.map.mean(dim=(2, 3)))


class Stores:
    """A forward hook that stores an output."""

    def __call__(self, module, inputs, output):
        self.output = output


def old_weight_norm():
    net = Net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(net.body[0])
    return net


def old_spectral_norm():
    net = Net()
    nn.utils.spectral_norm(net.stem[0])
    return net


def with_a_hook():
    net = Net()
    net.body.register_forward_hook(Stores())
    return net


def with_a_lock():
    net = Net()
    net.lock, net.stem[1].process_group = threading.Lock(), threading.Lock()
    net.body.register_forward_hook(Stores())
    net.stem.register_forward_pre_hook(functools.partial(lambda lock, module, inputs: None, threading.Lock()))
    return net


AS_THEY_STAND = (Keeps, old_weight_norm, old_spectral_norm, with_a_hook, with_a_lock)


def snapshot(net):
    hooks = [
        [list(vars(m)[name].values()) for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")]
        for m in net.modules()
    ]
    own = [(type(m), m.training, {k: id(v) for k, v in vars(m).items()}) for m in net.modules()]
    tensors = {name: (t.detach().clone(), t.requires_grad, t.grad) for name, t in (*net.named_parameters(), *net.named_buffers())}
    return hooks, own, tensors


def assert_untouched(net, before):
    hooks, own, tensors = snapshot(net)
    assert hooks == before[0]
    assert own == before[1]
    for name, (value, requires_grad, grad) in tensors.items():
        assert torch.equal(value, before[2][name][0])
        assert (requires_grad, id(grad)) == (before[2][name][1], id(before[2][name][2]))


@pytest.mark.parametrize("method", ["saliency", "guided_backprop", "grad_cam"])
@pytest.mark.parametrize("make", AS_THEY_STAND)
def test_whatever_a_model_keeps_of_its_last_forward(make, method):
    _, x, target = problem()
    net = make().eval()
    want = explain(net, x, target, method)
    assert want.max() > 0
    torch.testing.assert_close(
        want, by_formula(method, net if make is old_spectral_norm else Net(), x, target), rtol=2e-4, atol=1e-5
    )
    net.train()
    net.stem[0].requires_grad_(False)
    net(x).sum().backward()
    net.load_state_dict(make().state_dict())  # the statistics that batch norm has just updated
    before = snapshot(net)
    for _ in range(2):
        torch.testing.assert_close(explain(net, x, target, method), want, rtol=1e-4, atol=1e-6)
        assert_untouched(net, before)
    if isinstance(net, Keeps):
        assert net.map.requires_grad


def test_the_model_is_left_alone_by_an_exception():
    net, x, target = problem()
    net.train()
    net(x).sum().backward()
    fails = torch.zeros(1, 4, 16, 14)
    before = snapshot(net)
    for method in METHODS:
        with pytest.raises(RuntimeError, match="channels"):
            explain(net, fails, 0, method)
        assert_untouched(net, before)
    for options in ({"n_steps": "many"}, {"nothing": 1}):
        with pytest.raises(TypeError):
            explain(net, x, target, "integrated_gradients", **options)
        assert_untouched(net, before)


def compiled(net):
    return torch.compile(net, backend="eager")


def compiled_in_place(net):
    net.compile(backend="eager")
    return net


def compiled_inside(net):
    net.body = torch.compile(net.body, backend="eager")
    net.stem[0].compile(backend="eager")
    return net


@pytest.mark.parametrize("method", ["saliency", "guided_backprop", "grad_cam"])
@pytest.mark.parametrize(
    "wrap", [compiled, compiled_in_place, compiled_inside, nn.DataParallel, lambda n: compiled(nn.DataParallel(n))]
)
def test_a_compiled_or_wrapped_model_is_explained_as_the_module_in_it(wrap, method):
    net, x, target = problem()
    want = explain(net, x, target, method)
    wrapped = wrap(net)
    assert torch.equal(explain(wrapped, x, target, method), want)
    if method == "grad_cam":
        assert find_layer(wrapped, x[:1]) in (net.body, getattr(net.body, "_orig_mod", None))
        names = [name for name, module in wrapped.named_modules() if name.endswith("body")]
        inner = "body" if wrap in (compiled_in_place, compiled_inside) else names[0]
        for layer in ("body", net.body) if inner == "body" else ("body",):
            assert torch.equal(explain(wrapped, x, target, method, layer=layer), want)
    if wrap is compiled_inside:
        assert torch.equal(
            explain(wrapped, x, target, "grad_cam", layer="body._orig_mod.2"),
            explain(Net(), x, target, "grad_cam", layer="body.2"),
        )


# ---- guided backpropagation ---------------------------------------------------------------------------------------------


class Activated(nn.Module):
    """Two layers with an activation between them. [N, 3, H, W] -> [N, 5]."""

    def __init__(self, activation):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 5)
        self.activation = activation

    def forward(self, x):
        return self.head(self.activation(self.second(self.activation(3 * self.first(x)))).mean(dim=(2, 3)))


class Guided(torch.autograd.Function):
    """The activation, and of its gradient what its derivative lets pass of the positive part."""

    @staticmethod
    def forward(ctx, x, activation):
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            ctx.leaf, ctx.y = leaf, activation(leaf)
        return ctx.y.detach()

    @staticmethod
    def backward(ctx, grad):
        return torch.autograd.grad(ctx.y, ctx.leaf, grad.relu())[0], None


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize(
    "activation",
    [nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.Hardtanh(), nn.Threshold(0.1, 0.0), F.relu, F.relu6, torch.relu_],
    ids=lambda a: getattr(a, "__name__", repr(a)),
)
def test_guided_backprop_of_every_rectifier(activation, prepared):
    _, x, target = problem()
    net = Activated(activation)
    if prepared:
        sib_fast.prepare(net)
    leaf = x.clone().requires_grad_()
    out_of_place = (
        type(activation)() if isinstance(activation, nn.ReLU) else torch.relu if activation is torch.relu_ else activation
    )
    oracle = Activated(lambda v: Guided.apply(v, out_of_place))
    (gradient,) = torch.autograd.grad(oracle(leaf).gather(1, target[:, None]).sum(), leaf)
    got = explain(net, x, target, "guided_backprop")
    torch.testing.assert_close(got, gradient.abs().amax(1, keepdim=True), rtol=1e-5, atol=1e-7)
    assert (got - explain(net, x, target, "saliency")).abs().max() > 0.05 * got.max()


@pytest.mark.parametrize("activation", [nn.SiLU(), nn.LeakyReLU(), nn.PReLU(), nn.GELU(), nn.ELU(), torch.tanh])
def test_guided_backprop_without_a_rectifier_is_an_error(activation):
    _, x, target = problem()
    with pytest.raises(UndefinedMethodError, match=r"explain: model must run ReLU, ReLU6, Hardtanh or Threshold .*'saliency'"):
        explain(Activated(activation), x, target, "guided_backprop")


def test_guided_backprop_names_the_activations_that_it_leaves():
    _, x, target = problem()
    with pytest.warns(UserWarning, match="guided_backprop is defined for rectifiers only: Silu pass the plain gradient"):
        explain(Activated(lambda v: F.silu(F.relu(v))), x, target, "guided_backprop")


@pytest.mark.parametrize("method", METHODS)
def test_a_frozen_network_is_explained_as_one_that_is_not(method):
    net, x, target = problem()
    want = explain(net, x, target, method)
    assert torch.equal(explain(net.requires_grad_(False), x, target, method), want)


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_and_float64_networks(method):
    net, x, target = problem()
    want = explain(net, x, target, method)
    for dtype, tolerance in ((torch.float64, 1e-3), (torch.bfloat16, 0.3)):
        got = explain(copy.deepcopy(net).to(dtype), x.to(dtype), target, method)
        assert got.dtype == torch.float32
        assert (got - want).norm() < tolerance * want.norm()


def test_guided_backprop_is_guided():
    net, x, target = problem()
    assert (explain(net, x, target, "guided_backprop") - explain(net, x, target, "saliency")).abs().max() > 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_the_model_is_left_alone(method):
    net, x, target = problem()
    net.train()
    criterion = sib_fast.SIBLoss(window_size=5).attach(net)
    criterion(net(x), target).backward()
    state, grads = copy.deepcopy(net.state_dict()), [p.grad.clone() for p in net.parameters()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in net.modules()]
    before = x.clone()
    with torch.inference_mode():
        explain(net, x, None, method)
    assert net.training
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert all(torch.equal(p.grad, grad) for p, grad in zip(net.parameters(), grads, strict=True))
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in net.modules()] == hooks
    assert torch.equal(x, before)
    assert not x.requires_grad


def test_targets():
    net, x, _ = problem()
    logits = copy.deepcopy(net).eval()(x)
    predicted = explain(net, x)
    assert torch.equal(predicted, explain(net, x, logits.argmax(1)))
    assert torch.equal(explain(net, x, 3), explain(net, x, torch.full((4,), 3)))
    assert not torch.equal(explain(net, x, 3), explain(net, x, 2))


def one_logit_problem():
    """A network with one logit z, and the same network with the logits −z and z of its two classes."""
    net, x, _ = problem()
    net.head = nn.Linear(12, 1)
    with torch.no_grad():
        net.head.bias -= net.eval()(x).median()
    twin = copy.deepcopy(net)
    twin.head = nn.Linear(12, 2)
    with torch.no_grad():
        for mine, theirs in zip(twin.head.parameters(), net.head.parameters(), strict=True):
            mine.copy_(torch.cat([-theirs, theirs]))
    return net, twin, x


@pytest.mark.parametrize("method", METHODS)
def test_one_logit_is_explained_as_two_classes(method):
    net, twin, x = one_logit_problem()
    predicted = (net(x)[:, 0] > 0).long()
    assert 0 < predicted.sum() < 4
    for target in (0, 1, predicted, None):
        wanted = explain(twin, x, predicted if target is None else target, method)
        got = explain(net, x, target, method)
        assert wanted.any()
        assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-6 * wanted.max())
    with pytest.raises(ValueError, match=r"explain: target must lie in \[0, 2\), got 2"):
        explain(net, x, 2, method)


def test_the_controls_of_one_logit_are_those_of_two_classes():
    from sib_fast.explain.controls import insertion_deletion

    net, twin, x = one_logit_problem()
    twin.head.weight.data[0], twin.head.bias.data[0] = 0, 0  # (0, z): softmax is the sigmoid
    target = torch.tensor([0, 1, 1, 0])
    maps = torch.rand(4, 1, 16, 14)
    for got, wanted in zip(*(insertion_deletion(n, x, target, maps) for n in (net, twin)), strict=True):
        assert torch.allclose(got, wanted, rtol=1e-6)
        assert 0.1 < got.min() <= got.max() < 0.9


@pytest.mark.parametrize("method", METHODS)
def test_an_image_does_not_depend_on_its_batch(method):
    net, x, target = problem()
    whole = explain(net, x, target, method)
    alone = explain(net, x[:1], target[:1], method)
    torch.testing.assert_close(alone, whole[:1], rtol=1e-4, atol=1e-5 * whole.max().item())


def test_layers_by_name_and_by_module():
    net, x, target = problem()
    by_name = explain(net, x, target, "grad_cam", layer="stem")
    assert torch.equal(by_name, explain(net, x, target, "grad_cam", layer=net.stem))
    assert not torch.equal(by_name, explain(net, x, target, "grad_cam"))


@pytest.mark.parametrize(
    ("name", "layer"),
    [("resnet18", "layer4"), ("vgg11", "features"), ("mobilenet_v2", "features"), ("densenet121", "features"),
     ("efficientnet_b0", "features"), ("convnext_tiny", "features"), ("mobilenet_v3_small", "features")],
)  # fmt: skip
def test_the_layer_of_torchvision_models(name, layer):
    models = pytest.importorskip("torchvision.models", exc_type=ImportError)
    net = getattr(models, name)(weights=None, num_classes=5).eval()
    assert find_layer(net, torch.randn(1, 3, 64, 64)) is net.get_submodule(layer)


def test_a_transformer_has_no_layer_of_its_own():
    models = pytest.importorskip("torchvision.models", exc_type=ImportError)
    net = models.VisionTransformer(32, 8, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=8, num_classes=5)
    nn.init.normal_(net.heads.head.weight)  # zero by default
    with pytest.raises(ValueError, match="layer must be given for this network, got None and tokens follow its last feature map"):
        explain(net, torch.randn(1, 3, 32, 32), 0, "grad_cam")
    assert explain(net, torch.randn(1, 3, 32, 32), 0, "saliency").max() > 0


def test_bad_input():
    net, x, target = problem()
    unused = copy.deepcopy(net)
    unused.unused = nn.ReLU()
    for error, words, call in (
        (TypeError, "model must be a torch.nn.Module, got function", lambda: explain(lambda v: v, x)),
        (ValueError, "method must be one of 'saliency', .*, got 'lime'", lambda: explain(net, x, target, "lime")),
        (ValueError, "layer must be None for method 'saliency'", lambda: explain(net, x, target, layer="stem")),
        (
            ValueError,
            "layer must be one of the model's modules .*, got 'nine'",
            lambda: explain(net, x, 0, "grad_cam", layer="nine"),
        ),
        (
            ValueError,
            r"layer must return a floating-point \[N, C, H, W\] tensor, got \[1, 5\] from 'head'",
            lambda: explain(net, x, 0, "grad_cam", layer="head"),
        ),
        (
            ValueError,
            "layer must run in a forward pass in eval mode, got 'unused', which does not",
            lambda: explain(unused, x, 0, "layer_cam", layer="unused"),
        ),
        (ValueError, r"target must lie in \[0, 5\), got 5 … 5", lambda: explain(net, x, 5)),
        (TypeError, r"target must be int64 class indices, got torch\.float32", lambda: explain(net, x, target.float())),
        (ValueError, "target must have shape", lambda: explain(net, x, target[:2])),
        (ValueError, r"model must return logits \[N, classes\], got \[4, 8, 16, 14\]", lambda: explain(net.stem, x, 0)),
    ):
        with pytest.raises(error, match=f"explain: {words}"):
            call()


def test_the_six_that_we_report_are_methods():
    assert len(REPORTED) == 6
    assert set(REPORTED) <= set(METHODS)


@pytest.mark.parametrize(("images", "most"), [(1, 8), (2, 16), (12, 12), (20, 20)])
def test_integrated_gradients_hold_few_images_in_memory(images, most):
    """8 steps of every image in one pass took 5.7 GB for 8 images of 224 px."""
    x, target = image_batch(images=images, height=16, width=14)
    net, seen = Net(), []
    net.register_forward_hook(lambda module, given, out: seen.append(len(given[0])))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        maps = explain(net, x, target, "integrated_gradients")
    assert max(seen) == most
    alone = torch.cat([explain(net, x[i : i + 1], target[i : i + 1], "integrated_gradients") for i in range(images)])
    torch.testing.assert_close(maps, alone)
