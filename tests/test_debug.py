"""SIB_FAST_DEBUG=1: non-finite values raise and say where; without it nothing is looked at."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sib_fast import SIBLoss
from sib_fast.testing.networks import conv_net, image_batch
from tests.derivatives import identity_with


def step(criterion: SIBLoss, x: Tensor, **extra: object) -> Tensor:
    _, target = image_batch()
    x = x.requires_grad_()
    return criterion(conv_net(norm="group")(x), target, x, **extra)


def with_bad_pixel(bad: float) -> Tensor:
    x, _ = image_batch()
    x[3, 0, 1, 1] = bad
    return x


@pytest.fixture
def debug(monkeypatch):
    monkeypatch.setenv("SIB_FAST_DEBUG", "1")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_pixel_shows_in_the_logits_first(debug, bad):
    with pytest.raises(FloatingPointError, match=r"SIBLoss: logits must be finite \(SIB_FAST_DEBUG=1\), got NaN or Inf"):
        step(SIBLoss(window_size=5), with_bad_pixel(bad))


def test_x_is_named_where_the_logits_are_good(debug):
    x = with_bad_pixel(math.nan).requires_grad_()
    logits = conv_net(norm="group")(torch.nan_to_num(x))
    with pytest.raises(FloatingPointError, match="SIBLoss: x must be finite"):
        SIBLoss(window_size=5)(logits, image_batch()[1], x)


# Identity whose derivative overflows.
infinite_slope = identity_with(lambda grad: grad * math.inf)


@pytest.mark.parametrize(
    ("name", "options", "extra"),
    [
        ("mask", {"mask": lambda vjp: vjp[:, :1] * math.nan}, {}),
        ("mask", {}, {"mask": torch.full((6, 1, 12, 11), math.inf)}),
        ("base", {"base_loss": lambda z, t: z.sum() * math.nan}, {}),
        ("foreground", {"estimator": lambda k, el: k.sum() * math.inf}, {}),
        ("background", {"lambda_bg": 1.0, "background": lambda s: s.vjp_variance.sum() * math.nan}, {}),
        ("loss", {"objective": lambda base, fg, bg, a, b: base / 0}, {}),
    ],
    ids=["mask", "given mask", "base", "foreground", "background", "loss"],
)
def test_the_term_that_is_bad_is_named(debug, name, options, extra):
    # The loss is bad too in most of these cases; the term is what helps.
    with pytest.raises(FloatingPointError, match=f"SIBLoss: {name} must be finite"):
        step(SIBLoss(window_size=5, **options), image_batch()[0], **extra)


def test_the_vjp_is_named(debug):
    x, target = image_batch()
    x.requires_grad_()
    logits = conv_net(norm="group")(infinite_slope(x))
    with pytest.raises(FloatingPointError, match="SIBLoss: vjp must be finite"):
        SIBLoss(window_size=5)(logits, target, x)


def test_a_good_step_passes(debug):
    loss = step(SIBLoss(window_size=5), image_batch()[0])
    loss.backward()
    assert loss.isfinite()


@pytest.mark.parametrize("value", [None, "0", ""])
def test_without_it_values_are_not_looked_at(monkeypatch, value):
    if value is None:
        monkeypatch.delenv("SIB_FAST_DEBUG", raising=False)
    else:
        monkeypatch.setenv("SIB_FAST_DEBUG", value)
    assert step(SIBLoss(window_size=5), with_bad_pixel(math.nan)).isnan()


def test_inactive_calls_are_not_looked_at(debug):
    assert SIBLoss().eval()(torch.full((2, 5), math.nan), torch.zeros(2).long()).isnan()
