"""Heads with one logit and with several labels: every scalar, target and route, against plain PyTorch with two classes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sib_fast import SIBLoss, compile_step, vjp_map
from sib_fast.testing.networks import conv_net, image_batch, parameter_gradients, plain_step, relative_error
from sib_fast.vjp import LABEL_SCALARS, SCALARS, energy_cotangent, multilabel_energy_cotangent, normalised

WEIGHTS = {"lambda_fg": 3.0, "lambda_bg": 1000.0, "window_size": 5}
BCE = nn.BCEWithLogitsLoss()
LABELS = torch.tensor([0, 1, 1, 0, 1, 0])


def log_odds(z: Tensor, y: Tensor) -> Tensor:
    """log p_y − log(1 − p_y) of the softmax over (0, z)."""
    p = torch.softmax(torch.cat([torch.zeros_like(z), z], 1), 1).gather(1, y[:, None])
    return (p.log() - (1 - p).log()).sum()


# Σ over images of the scalar of two classes (0, z), as one would write it without this package.
PLAIN = {
    "energy": lambda z, y: 0.5 * torch.softmax(torch.cat([torch.zeros_like(z), z], 1), 1).square().sum(),
    "multilabel_energy": lambda z, y: 0.5 * torch.softmax(torch.cat([torch.zeros_like(z), z], 1), 1).square().sum(),
    "logit_sum": lambda z, y: torch.cat([torch.zeros_like(z), z], 1).sum(),
    "label_logit": log_odds,
    "label_log_probability": lambda z, y: -F.binary_cross_entropy_with_logits(z[:, 0], y.to(z.dtype), reduction="sum"),
    "predicted_logit": lambda z, y: log_odds(z, (z.detach()[:, 0] > 0).long()),
}


def one_logit_net(norm: str = "batch") -> nn.Module:
    net = conv_net(classes=1, norm=norm)
    with torch.no_grad():
        net[-1].bias.copy_(0.3)
    return net


def images() -> Tensor:
    return image_batch()[0]


def labels() -> Tensor:
    return LABELS.to(torch.get_default_device())


# ---- the map ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scalar", SCALARS)
def test_one_logit_is_two_classes(scalar):
    net, x = one_logit_net().double(), images().double().requires_grad_()
    logits = net(x)
    assert 0 < (logits > 0).sum() < 6  # both classes are predicted
    weight = torch.randn_like(x)
    wanted = (x, *net.parameters())
    (plain,) = torch.autograd.grad(PLAIN[scalar](logits, LABELS), x, create_graph=True)
    ours = vjp_map(logits, x, scalar, LABELS)
    assert relative_error(ours, plain) < 1e-13
    exact = torch.autograd.grad((weight * plain * plain).sum(), wanted, retain_graph=True, allow_unused=True)
    got = torch.autograd.grad((weight * ours * ours).sum(), wanted, allow_unused=True)
    # Relative to the largest: a linear scalar has no derivative by the last bias, and the plain form's rounding there.
    scale = max(e.norm() for e in exact if e is not None)
    for g, e, w in zip(got, exact, wanted, strict=True):
        g, e = (torch.zeros_like(w) if d is None else d for d in (g, e))
        assert (g - e).norm() < 1e-11 * scale


@pytest.mark.parametrize("z", [0.0, 1e-9, 1.0, 17.0, 40.0, 200.0, -1e-9, -17.0, -40.0, -200.0])
def test_one_logit_near_saturation_and_about_zero(z):
    # With d = |z|, q = σ(−d) = e/(1+e) and t = tanh(d/2): E' = ±p q t, E'' = p q [½(1 − t²) − t (p − q)].
    e = math.exp(-abs(z))
    p, q, t = 1 / (1 + e), e / (1 + e), math.tanh(abs(z) / 2)
    x = torch.tensor([[z]], dtype=torch.float64, requires_grad=True)
    vjp = vjp_map(x * 1.0, x)
    (second,) = torch.autograd.grad(vjp.sum(), x)
    assert math.isclose(vjp.item(), math.copysign(p * q * t, z), rel_tol=1e-13)
    assert math.isclose(second.item(), p * q * (0.5 * (1 - t * t) - t * (p - q)), rel_tol=1e-12)
    # The two-class energy's cotangent is that of the same number.
    two = energy_cotangent(torch.tensor([[0.0, z]], dtype=torch.float64))[0, 1].item()
    assert math.isclose(vjp.item(), two, rel_tol=1e-7, abs_tol=1e-16)


@pytest.mark.parametrize(("label", "z"), [(1, 40.0), (0, -40.0), (1, -40.0), (0, 3.0)])
def test_the_log_probability_of_one_logit_does_not_cancel(label, z):
    x = torch.tensor([[z]], requires_grad=True)
    sign = 2 * label - 1
    exact = sign / (1 + math.exp(sign * z))
    got = vjp_map(x * 1.0, x, "label_log_probability", torch.tensor([label])).item()
    assert math.isclose(got, exact, rel_tol=1e-6)


def test_the_multilabel_energy_is_a_sum_of_one_logit_energies():
    z = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    (exact,) = torch.autograd.grad(0.5 * (z.sigmoid() ** 2 + (1 - z.sigmoid()) ** 2).sum(), z)
    got = multilabel_energy_cotangent(z)
    assert relative_error(got, exact) < 1e-14
    for k in range(7):
        assert relative_error(energy_cotangent(z[:, k : k + 1]), exact[:, k : k + 1]) < 1e-14


def test_a_label_that_one_logit_does_not_have():
    x = torch.randn(2, 3, requires_grad=True)
    for label in (2, -1):
        with pytest.raises(RuntimeError, match="out of bounds"):
            vjp_map(x[:, :1], x, "label_logit", torch.tensor([0, label]))


# ---- the loss -----------------------------------------------------------------------------------------------------------

TARGETS = {
    "float [N, 1]": lambda y: y[:, None].float(),
    "double [N, 1]": lambda y: y[:, None].double(),
    "int [N, 1]": lambda y: y[:, None],
    "bool [N, 1]": lambda y: y[:, None].bool(),
    "float [N]": lambda y: y.float(),
    "int [N]": lambda y: y,
    "int32 [N]": lambda y: y.int(),
    "uint8 [N]": lambda y: y.byte(),
    "bool [N]": lambda y: y.bool(),
}


class TwoClasses(nn.Module):
    """The same network with the logits of both classes."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        z = self.net(x)
        return torch.cat([torch.zeros_like(z), z], 1)


@pytest.mark.parametrize("target", TARGETS)
def test_the_step_of_one_logit_is_the_plain_step_of_two_classes(backend, target):
    net = one_logit_net().double()
    x, y = images().double(), labels()
    plain = plain_step(TwoClasses(net), x, y, **WEIGHTS)
    exact = parameter_gradients(plain.loss, net)
    leaf = x.requires_grad_()
    criterion = SIBLoss(**WEIGHTS, base_loss=BCE, backend=backend)
    loss = criterion(net(leaf), TARGETS[target](y), leaf)
    assert relative_error(loss, plain.loss) < 1e-12
    for name in ("base", "foreground", "background"):
        assert relative_error(criterion.terms[name], getattr(plain, name)) < 1e-11, name
    for name, got in parameter_gradients(loss, net).items():
        assert relative_error(got, exact[name]) < 1e-11, name
    # Validation is the same base loss, which PyTorch gives in the target's precision.
    with torch.no_grad():
        assert relative_error(criterion(net(x), TARGETS[target](y)), plain.base) < 1e-6


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("scalar", LABEL_SCALARS)
def test_labels_of_one_logit(target, scalar):
    net, x = one_logit_net().double(), images().double().requires_grad_()
    criteria = [SIBLoss(**WEIGHTS, base_loss=BCE, scalar=s) for s in (scalar, PLAIN[scalar])]
    ours, plain = (c(net(x), TARGETS[target](LABELS), x) for c in criteria)
    assert relative_error(ours, plain) < 1e-12
    exact = parameter_gradients(plain, net)
    for name, got in parameter_gradients(ours, net).items():
        assert relative_error(got, exact[name]) < 1e-10, name


@pytest.mark.parametrize("scalar", LABEL_SCALARS)
def test_soft_targets_of_one_logit_are_labels_above_one_half(scalar):
    net, x = one_logit_net().double(), images().double().requires_grad_()
    soft = torch.where(LABELS == 1, 0.9, 0.5)[:, None]
    hard = SIBLoss(**WEIGHTS, base_loss=BCE, scalar=scalar)
    foreground = []
    for target in (soft, LABELS):
        hard(net(x), target, x)
        foreground.append(hard.terms["foreground"])
    assert torch.equal(*foreground)


def test_a_target_of_n_for_a_loss_that_squeezes():
    net, x = one_logit_net().double(), images().double().requires_grad_()
    squeezes = SIBLoss(**WEIGHTS, base_loss=lambda z, y: F.binary_cross_entropy_with_logits(z[:, 0], y))
    exact = SIBLoss(**WEIGHTS, base_loss=BCE)(net(x), LABELS[:, None].double(), x)
    assert relative_error(squeezes(net(x), LABELS.double(), x), exact) < 1e-12


@pytest.mark.parametrize("active", [True, False])
@pytest.mark.parametrize("base_loss", [None, nn.CrossEntropyLoss(label_smoothing=0.1), F.cross_entropy])
def test_cross_entropy_of_one_logit_is_refused(active, base_loss):
    x = images().requires_grad_()
    criterion = SIBLoss(window_size=5, base_loss=base_loss).train(active)
    for target in (torch.zeros(6).long(), torch.zeros(6, 1)):
        with pytest.raises(ValueError, match=r"SIBLoss: base_loss must not be cross-entropy for one logit, got logits \[6, 1\]"):
            criterion(one_logit_net()(x), target, x)


# ---- several labels -----------------------------------------------------------------------------------------------------


def multi_hot() -> Tensor:
    return (torch.arange(30).view(6, 5) % 3 == 0).to(torch.get_default_device())


def plain_multilabel_step(net: nn.Module, x: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The plain step with its energy exchanged: every logit a network of one logit, whose energies are summed."""
    leaf = x.detach().clone().requires_grad_()

    class Sum(nn.Module):
        """Logits (0, z) of every label, one image's labels below each other."""

        def forward(self, x: Tensor) -> Tensor:
            z = net(x).reshape(-1, 1)
            return torch.cat([torch.zeros_like(z), z], 1)

    step = plain_step(Sum(), leaf, target, base_loss=lambda z, y: BCE(z[:, 1].view(6, 5), y), **WEIGHTS)
    return step.loss, parameter_gradients(step.loss, net)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bool, torch.uint8, torch.int64], ids=str)
def test_several_labels_equal_the_plain_step(backend, dtype):
    net, x = conv_net().double(), images().double()
    loss, exact = plain_multilabel_step(net, x, multi_hot().double())
    leaf = x.requires_grad_()
    criterion = SIBLoss(**WEIGHTS, base_loss=BCE, scalar="multilabel_energy", backend=backend)
    got = criterion(net(leaf), multi_hot().to(dtype), leaf)
    assert relative_error(got, loss) < 1e-12
    for name, gradient in parameter_gradients(got, net).items():
        assert relative_error(gradient, exact[name]) < 1e-11, name
    with torch.no_grad():
        assert relative_error(criterion(net(x), multi_hot().to(dtype)), BCE(net(x), multi_hot().double())) < 1e-6


@pytest.mark.parametrize("scalar", [*LABEL_SCALARS])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64], ids=str)
def test_a_scalar_of_one_label_refuses_a_multi_hot_target(scalar, dtype):
    x = images().requires_grad_()
    words = rf"SIBLoss: target must be class indices or floating-point probabilities for scalar='{scalar}', got {dtype} \[6, 5\]"
    with pytest.raises(TypeError, match=words):
        SIBLoss(window_size=5, base_loss=BCE, scalar=scalar)(conv_net()(x), multi_hot().to(dtype), x)


@pytest.mark.parametrize("scalar", LABEL_SCALARS)
@pytest.mark.parametrize("rows", [multi_hot().float(), torch.zeros(6, 5)], ids=["several", "none"])
def test_floats_that_are_no_probabilities_too(scalar, rows):
    x = images().requires_grad_()
    criterion = SIBLoss(window_size=5, base_loss=BCE, scalar=scalar)
    for _ in range(2):  # on the CPU at every batch
        with pytest.raises(
            ValueError, match=f"SIBLoss: target must hold one label per image for scalar='{scalar}', got rows that"
        ):
            criterion(conv_net()(x), rows, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_smoothed_and_mixed_targets_are_labels(dtype):
    x, target = image_batch(classes=100)
    x.requires_grad_()
    net = conv_net(classes=100)
    smooth = F.one_hot(target, 100) * 0.9 + 0.1 / 100
    for soft in (smooth, 0.7 * smooth + 0.3 * smooth.flip(0), 0.5 * smooth):
        for base_loss in (None, BCE):
            loss = SIBLoss(**WEIGHTS, scalar="label_logit", base_loss=base_loss)(net(x), soft.to(dtype), x)
            hard = SIBLoss(**WEIGHTS, scalar="label_logit", base_loss=lambda z, y: 0 * z.sum())(net(x), soft.argmax(1), x)
            assert loss > hard


def test_on_a_device_soft_targets_are_looked_at_in_the_first_batch_and_under_debug(monkeypatch):
    monkeypatch.setattr("sib_fast.criterion._is_on_the_host", lambda tensor: False)
    x, target = image_batch()
    x.requires_grad_()
    logits = conv_net()(x)
    criterion = SIBLoss(window_size=5, base_loss=BCE, scalar="label_logit")
    with pytest.raises(ValueError, match="target must hold one label per image"):
        criterion(logits, multi_hot().float(), x)
    criterion(logits, multi_hot().float(), x)
    monkeypatch.setenv("SIB_FAST_DEBUG", "1")
    criterion = SIBLoss(window_size=5, base_loss=BCE, scalar="label_logit")
    criterion(logits, F.one_hot(target, 5).float(), x)
    with pytest.raises(ValueError, match="target must hold one label per image"):
        criterion(logits, multi_hot().float(), x)


@pytest.mark.parametrize("active", [True, False])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64], ids=str)
def test_cross_entropy_refuses_a_multi_hot_target(active, dtype):
    x = images().requires_grad_()
    words = r"SIBLoss: target must be class indices or floating-point probabilities for cross-entropy, got .* \[6, 5\]"
    with pytest.raises(TypeError, match=words):
        SIBLoss(window_size=5).train(active)(conv_net()(x), multi_hot().to(dtype), x)


def test_a_function_is_given_the_multi_hot_target():
    x, seen = images().requires_grad_(), []
    scalar = lambda z, y: seen.append(y) or (z * y).sum()  # noqa: E731
    SIBLoss(window_size=5, base_loss=BCE, scalar=scalar)(conv_net()(x), multi_hot(), x)
    assert torch.equal(seen[0], multi_hot())


def test_a_loss_of_index_lists_gets_them_as_they_are():
    x, target = images().requires_grad_(), torch.tensor([[1, 3, -1, 0, 0]] * 6)
    net, base_loss = conv_net(), nn.MultiLabelMarginLoss()
    criterion = SIBLoss(window_size=5, base_loss=base_loss)
    logits = net(x)
    criterion(logits, target, x)
    assert torch.equal(criterion.terms["base"], base_loss(logits, target))


def test_one_label_through_binary_cross_entropy_keeps_every_scalar():
    # timm's BinaryCrossEntropy is one-hot inside: class indices in, a loss of one label.
    timm_loss = pytest.importorskip("timm.loss", exc_type=ImportError)
    x, target = image_batch()
    x.requires_grad_()
    net = conv_net(norm="group").double()
    for scalar in SCALARS:
        criteria = [SIBLoss(**WEIGHTS, base_loss=loss, scalar=scalar) for loss in (timm_loss.BinaryCrossEntropy(0.1), None)]
        binary, ce = (c(net(x.double()), target, x) and c.terms for c in criteria)
        assert torch.equal(binary["foreground"], ce["foreground"]), scalar


# ---- routes -------------------------------------------------------------------------------------------------------------

HEADS = {
    "one logit": (1, "energy", lambda: LABELS[:, None].double()),
    "one logit, its label": (1, "label_log_probability", lambda: LABELS),
    "several labels": (5, "multilabel_energy", lambda: multi_hot()),
}


def head(name: str, norm: str = "batch", **options: object) -> tuple[nn.Module, SIBLoss, Tensor]:
    classes, scalar, target = HEADS[name]
    criterion = SIBLoss(**WEIGHTS, base_loss=nn.BCEWithLogitsLoss(), scalar=scalar, **options)
    return conv_net(classes=classes, norm=norm).double(), criterion, target()


@pytest.mark.parametrize("name", HEADS)
def test_attached_and_every(name):
    net, criterion, target = head(name, every=2, every_weight="mean")
    x = images().double()
    leaf = x.clone().requires_grad_()
    _, explicit, _ = head(name)
    exact = explicit(net(leaf), target, leaf)
    criterion.attach(net)
    for active in (True, False, True):
        loss = criterion(net(x), target)
        assert relative_error(loss, exact if active else explicit.terms["base"]) < 1e-12


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(name, dtype):
    net, criterion, target = head(name, norm="group")
    x = images().requires_grad_()
    exact = criterion(net(x.double()), target, x)
    wanted = dict(criterion.terms)
    with torch.autocast("cpu", dtype=dtype):
        loss = criterion(net.float()(x), target, x)
    assert loss.dtype == torch.float32
    assert relative_error(loss, exact) < 1e-3
    for term in ("base", "foreground", "background"):
        assert relative_error(criterion.terms[term], wanted[term]) < 0.1, term
    loss.backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.skipif(not hasattr(torch._dynamo.config, "trace_autograd_ops"), reason="this torch cannot trace autograd.grad")
@pytest.mark.parametrize("name", ["one logit, its label", "several labels"])
def test_compiled(name):
    net, criterion, target = head(name, norm="group")
    x = images().double()
    leaf = x.clone().requires_grad_()
    exact = parameter_gradients(criterion(net(leaf), target, leaf), net)
    step = compile_step(net, criterion, backend="aot_eager")
    got = parameter_gradients(step(x, target).loss, net)
    for key, wanted in exact.items():
        assert relative_error(got[key], wanted) < 1e-11, key


@pytest.mark.skipif(not hasattr(torch._dynamo.config, "trace_autograd_ops"), reason="this torch cannot trace autograd.grad")
def test_a_compiled_step_refuses_what_an_eager_one_does():
    x = images()
    for options, target, words in (
        ({"scalar": "label_logit", "base_loss": BCE}, multi_hot().float(), "target must hold one label per image"),
        ({}, torch.zeros(6, 1), "base_loss must not be cross-entropy for one logit"),
    ):
        net = conv_net(classes=target.shape[1], norm="group")
        step = compile_step(net, SIBLoss(window_size=5, **options), backend="aot_eager")
        with pytest.raises(Exception, match=words):
            step(x, target)


def test_normalised_one_logit():
    z = torch.tensor([[-30.0], [30.0], [0.0]], dtype=torch.float64)
    assert torch.equal(normalised(energy_cotangent(z)), torch.tensor([[-1.0], [1.0], [0.0]], dtype=torch.float64))
