"""Confident images: whose gradient their VJP is, and the cotangent over its norm, against plain PyTorch."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from sib_fast import SIBLoss, foreground_mask, vjp_map
from sib_fast.testing.networks import conv_net, image_batch, parameter_gradients, plain_step, relative_error
from sib_fast.vjp import SCALARS, energy_cotangent, own_share
from tests.test_vjp import PLAIN

WEIGHTS = {"lambda_fg": 3.0, "lambda_bg": 10.0, "window_size": 5}


class Confident(nn.Module):
    """A network that adds `gap` to the top logit of its first image. Shapes: [N, 3, H, W] -> [N, 5]."""

    def __init__(self, net: nn.Module, gap: float) -> None:
        super().__init__()
        self.net, self.gap = net, gap

    def forward(self, x: Tensor) -> Tensor:
        logits = self.net(x)
        top = torch.zeros_like(logits)
        top[0, logits[0].argmax()] = self.gap
        return logits + top


def plain_normalised_map(logits: Tensor, x: Tensor, scalar: str, labels: Tensor) -> Tensor:
    """R by autograd alone: every image's scalar over the norm of its gradient by the logits, which is held constant."""
    z = logits.detach().requires_grad_()
    (cotangent,) = torch.autograd.grad(PLAIN[scalar](z, labels), z)
    norms = cotangent.square().sum(1).sqrt()
    total = sum(PLAIN[scalar](logits[i : i + 1], labels[i : i + 1]) / norms[i] for i in range(len(norms)))
    return torch.autograd.grad(total, x, create_graph=True)[0]


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("scalar", SCALARS)
def test_the_normalised_map_and_its_derivative_equal_plain_pytorch(scalar, norm):
    net, (x, labels) = conv_net(norm=norm).double(), image_batch()
    x = x.double().requires_grad_()
    logits = net(x)
    plain = plain_normalised_map(logits, x, scalar, labels)
    ours = vjp_map(logits, x, scalar, labels, normalise_cotangent=True)
    assert relative_error(ours, plain) < 1e-13
    weight = torch.randn_like(x)
    wanted = (x, *net.parameters())
    exact, got = (
        torch.autograd.grad((weight * r * r).sum(), wanted, retain_graph=True, allow_unused=True) for r in (plain, ours)
    )
    for g, e in zip(got, exact, strict=True):
        assert (g is None or not g.any()) if e is None else relative_error(g, e) < 1e-10


def test_a_function_is_normalised_too():
    net, (x, labels) = conv_net().double(), image_batch()
    x = x.double().requires_grad_()
    logits = net(x)
    by_name, by_function = (vjp_map(logits, x, s, labels, normalise_cotangent=True) for s in ("energy", PLAIN["energy"]))
    assert relative_error(by_function, by_name) < 1e-12
    second = [torch.autograd.grad(r.square().sum(), net[0].weight, retain_graph=True)[0] for r in (by_function, by_name)]
    assert relative_error(*second) < 1e-11


def test_the_default_is_the_published_form_to_the_bit():
    x = image_batch()[0].requires_grad_()
    logits = conv_net()(x)
    assert torch.equal(vjp_map(logits, x), vjp_map(logits, x, normalise_cotangent=False))
    (raw,) = torch.autograd.grad(logits, x, energy_cotangent(logits).float(), create_graph=True)
    assert torch.equal(vjp_map(logits, x), raw)


@pytest.mark.parametrize("backend_norm", ["group", "frozen"])
def test_where_images_do_not_mix_only_the_scale_changes(backend, backend_norm):
    net = conv_net(norm="group" if backend_norm == "group" else "batch").double().train(backend_norm == "group")
    x = image_batch()[0].double().requires_grad_()
    logits = Confident(net, 8.0)(x)
    raw, unit = (vjp_map(logits, x, normalise_cotangent=n) for n in (False, True))
    norms = energy_cotangent(logits).norm(dim=1)
    assert norms.min() < 0.2 * norms.max()
    assert relative_error(unit * norms.view(6, 1, 1, 1), raw) < 1e-13
    # The mask has no scale but that of eps, which is in units of R.
    masks = [foreground_mask(r, window_size=5, eps=1e-30, backend=backend) for r in (raw, unit)]
    assert relative_error(masks[1], masks[0]) < 1e-10
    spread = (raw.mean(1).abs().flatten(1).amax(1) - raw.mean(1).abs().flatten(1).amin(1)).min()
    default = [foreground_mask(r, window_size=5, backend=backend) for r in (raw, unit)]
    assert relative_error(default[1], default[0]) < 100 * 1e-8 / spread


def test_below_eps_the_plain_mask_fades_and_the_normalised_one_does_not():
    net, x = conv_net(norm="group").double(), image_batch()[0].double().requires_grad_()
    for gap, fades in ((0.0, False), (27.0, True)):
        logits = Confident(net, gap)(x)
        raw, unit = (vjp_map(logits, x, normalise_cotangent=n)[:1] for n in (False, True))
        exact = foreground_mask(raw, window_size=5, eps=1e-40)
        assert relative_error(foreground_mask(unit, window_size=5), exact) < 1e-5
        assert (relative_error(foreground_mask(raw, window_size=5), exact) > 1e-2) == fades


# ---- range --------------------------------------------------------------------------------------------------------------


def pair(gap: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x = torch.tensor([[gap, 0.0, 0.0], [1.0, 0.0, -1.0]], requires_grad=True)
    return x.to(dtype), x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gap", [28.0, 100.0, 400.0])
def test_no_underflow(gap, dtype):
    # p = 1 − 1e-12 at 28. Two equal others: c ∝ (2, −1, −1)/√6 but for terms of order 1 − p.
    logits, x = pair(gap, dtype)
    vjp = vjp_map(logits, x, normalise_cotangent=True)
    exact = torch.tensor([2.0, -1.0, -1.0]) / math.sqrt(6)
    assert relative_error(vjp[0], exact) < 4 * torch.finfo(dtype).eps
    (second,) = torch.autograd.grad(vjp.square().sum(), x)
    assert second.isfinite().all()
    assert second[0].any()


@pytest.mark.parametrize("gap", [480.0, 720.0, 740.0, 1e3, 1e4])
@pytest.mark.parametrize("scalar", ["energy", "multilabel_energy"])
def test_a_cotangent_of_zero_stays_zero_without_nan(gap, scalar):
    x = torch.tensor([[gap, -gap, -gap], [1.0, 0.0, -1.0]], requires_grad=True)
    vjp = vjp_map(x * 1.0, x, scalar, normalise_cotangent=True)
    (second,) = torch.autograd.grad(vjp.sum(), x)
    assert not vjp[0].any()
    assert vjp[1].any()
    assert second.isfinite().all()


def test_nan_shows():
    x = torch.tensor([[math.nan, 1.0], [1.0, 2.0]], requires_grad=True)
    vjp = vjp_map(x * 1.0, x, normalise_cotangent=True)
    assert vjp[0].isnan().all()
    assert vjp[1].isfinite().all()


def test_under_fp16_autocast_a_confident_image_keeps_its_map():
    net, x = conv_net(norm="none"), image_batch()[0].requires_grad_()
    logits = Confident(net, 14.0)(x)
    exact = vjp_map(logits, x, normalise_cotangent=True)
    with torch.autocast("cpu", dtype=torch.float16):
        half = Confident(net, 14.0)(x)
    assert half.dtype == torch.float16
    got, plain = (vjp_map(half, x, normalise_cotangent=n)[0] for n in (True, False))
    alike = lambda r: torch.nn.functional.cosine_similarity(r.flatten(), exact[0].flatten(), dim=0)  # noqa: E731
    assert alike(got) > 0.99
    assert alike(plain) < alike(got)


# ---- the loss -----------------------------------------------------------------------------------------------------------


def test_the_loss_with_a_normalised_cotangent_equals_the_plain_step(backend, monkeypatch):
    net, (x, target) = conv_net().double(), image_batch()
    x = x.double()
    plain_net = copy.deepcopy(net)
    # The plain step differentiates ½ Σ‖p‖²: here with every image's part over its constant norm.
    norms = energy_cotangent(plain_net(x)).detach().norm(dim=1)
    softmax = torch.softmax
    with monkeypatch.context() as patched:
        scaled = lambda z, dim: softmax(z, dim) / norms[:, None].sqrt() if z.ndim == 2 else softmax(z, dim)  # noqa: E731
        patched.setattr(torch, "softmax", scaled)
        plain = plain_step(plain_net, x, target, **WEIGHTS)
        exact = parameter_gradients(plain.loss, plain_net)
    leaf = x.requires_grad_()
    criterion = SIBLoss(**WEIGHTS, normalise_cotangent=True, backend=backend)
    loss = criterion(net(leaf), target, leaf)
    for name in ("loss", "foreground", "background"):
        assert relative_error(criterion.terms[name], getattr(plain, name)) < 1e-11, name
    for name, got in parameter_gradients(loss, net).items():
        assert relative_error(got, exact[name]) < 1e-9, name


def test_the_variance_wants_a_weight_of_its_own():
    with pytest.raises(ValueError, match="SIBLoss: lambda_bg must be given for normalise_cotangent=True, got the default"):
        SIBLoss(normalise_cotangent=True)
    SIBLoss(normalise_cotangent=True, lambda_bg=1000.0)
    SIBLoss(normalise_cotangent=True, background="relative_variance", lambda_bg=0.1)


# ---- cross-talk ---------------------------------------------------------------------------------------------------------


def share(gap: float, norm: str = "batch", normalise: bool = False) -> float:
    net, x = Confident(conv_net(norm=norm), gap), image_batch(32)[0].requires_grad_()
    return own_share(net(x), x, "energy", None, None, normalise)


def test_the_share_by_hand():
    net, x = Confident(conv_net().double(), 9.0), image_batch(8)[0].double().requires_grad_()
    logits = net(x)
    energies = 0.5 * torch.softmax(logits, 1).square().sum(1)
    own, others = (torch.autograd.grad(e, x, retain_graph=True)[0][0] for e in (energies[0], energies[1:].sum()))
    exact = own.square().sum() / (own.square().sum() + others.square().sum())
    assert relative_error(torch.tensor(own_share(logits, x, "energy", None, None, False)), exact) < 1e-6


def test_train_mode_batch_norm_drowns_confident_images_and_unit_cotangents_do_not():
    # The figures of docs/trainers.md, "Confident images".
    top = {gap: torch.softmax(Confident(conv_net(), gap)(image_batch(32)[0]), 1)[0].max().item() for gap in (2.0, 5.0, 8.0, 12.0)}
    assert [round(p, 5) for p in top.values()] == [0.68231, 0.97734, 0.99885, 0.99998]
    assert 0.6 < share(2.0) < 0.7
    assert 0.6 < share(5.0) < 0.7
    assert 0.013 < share(8.0) < 0.015
    assert 4e-6 < share(12.0) < 6e-6
    for gap in top:
        assert 0.92 < share(gap, normalise=True) < 0.95
        assert share(gap, norm="group") == 1.0


def test_debug_warns_once_and_says_what_to_do(monkeypatch):
    monkeypatch.setenv("SIB_FAST_DEBUG", "1")
    x, target = image_batch(32)
    x.requires_grad_()
    net = Confident(conv_net(), 8.0)
    criterion = SIBLoss(**WEIGHTS)
    words = r"SIBLoss: the VJP of the image with the least cotangent is its own by 1\.\d% .* normalise_cotangent=True"
    with pytest.warns(UserWarning, match=words):
        criterion(net(x), target, x).backward()
    criterion(net(x), target, x)  # a second warning would be an error in this suite
    SIBLoss(**WEIGHTS, normalise_cotangent=True)(net(x), target, x)
    SIBLoss(**WEIGHTS)(Confident(conv_net(norm="group"), 8.0)(x), target, x)
