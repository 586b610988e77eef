"""What the loss lowers in the background."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sib_fast import RegionStatistics, region_statistics
from sib_fast.estimators import BACKGROUNDS, background
from sib_fast.testing.networks import plain_hsic


def problem() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    vjp, x = (torch.randn(4, 3, 6, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    return vjp, x, torch.rand(4, 1, 6, 5, generator=generator, dtype=torch.float64)


def statistics(vjp: Tensor, x: Tensor, mask: Tensor) -> RegionStatistics:
    return region_statistics(vjp, x, mask, background_grams=True, backend="reference")


def test_names():
    assert set(BACKGROUNDS) == {"variance", "hsic", "relative_variance"}
    assert not hasattr(background.variance, "needs_background_grams")
    assert background.hsic.needs_background_grams


def test_variance():
    vjp, x, mask = problem()
    exact = sum((r * (1 - m)).var(unbiased=True).item() for r, m in zip(vjp, mask, strict=True)) / 4
    assert math.isclose(background.variance(statistics(vjp, x, mask)).item(), exact, rel_tol=1e-12)


def test_relative_variance():
    vjp, x, mask = problem()
    vjp = vjp * torch.tensor([1.0, 1e-6, 1e3, 5.0], dtype=torch.float64).view(4, 1, 1, 1)
    exact = sum(((r * (1 - m)).var() / r.var()).item() for r, m in zip(vjp, mask, strict=True)) / 4
    got = background.relative_variance(statistics(vjp, x, mask))
    assert math.isclose(got.item(), exact, rel_tol=1e-12)
    assert math.isclose(background.relative_variance(statistics(1e-5 * vjp, x, mask)).item(), exact, rel_tol=1e-10)


def test_relative_variance_is_one_without_a_mask_and_zero_under_it():
    vjp, x, mask = problem()
    assert math.isclose(background.relative_variance(statistics(vjp, x, 0 * mask)).item(), 1.0, rel_tol=1e-12)
    assert background.relative_variance(statistics(vjp, x, 0 * mask + 1)).item() == 0.0


def test_hsic_is_of_the_background_parts():
    vjp, x, mask = problem()
    exact = plain_hsic((vjp * (1 - mask)).flatten(1), (x * (1 - mask)).flatten(1))
    assert math.isclose(background.hsic(statistics(vjp, x, mask)).item(), exact.item(), rel_tol=1e-12)


def test_hsic_without_background_grams_says_so():
    vjp, x, mask = problem()
    with pytest.raises(TypeError, match="hsic_biased: gram_vjp must be a tensor, got NoneType"):
        background.hsic(region_statistics(vjp, x, mask, backend="reference"))


@pytest.mark.parametrize("role", BACKGROUNDS.values(), ids=BACKGROUNDS)
def test_gradcheck(role):
    vjp, x, mask = (t[:3, :2, :2, :2].clone() for t in problem())
    assert torch.autograd.gradcheck(lambda r, m: role(statistics(r, x, m)), (vjp.requires_grad_(), mask.requires_grad_()))


@pytest.mark.parametrize("role", BACKGROUNDS.values(), ids=BACKGROUNDS)
@pytest.mark.parametrize("case", ["zero image", "zero batch", "constant image"])
def test_degenerate_vjp_has_a_finite_value_and_gradient(role, case):
    vjp, x, mask = problem()
    vjp = {"zero image": vjp.clone(), "zero batch": torch.zeros_like(vjp), "constant image": vjp.clone()}[case]
    if case != "zero batch":
        vjp[1] = 0.0 if case == "zero image" else 0.25
    vjp.requires_grad_()
    value = role(statistics(vjp, x, mask))
    assert value.isfinite()
    assert torch.autograd.grad(value, vjp)[0].isfinite().all()


@pytest.mark.parametrize("role", BACKGROUNDS.values(), ids=BACKGROUNDS)
def test_nan_propagates(role):
    vjp, x, mask = problem()
    vjp[2, 0, 0, 0] = math.nan
    assert role(statistics(vjp, x, mask)).isnan()


@pytest.mark.parametrize("role", BACKGROUNDS.values(), ids=BACKGROUNDS)
def test_fullgraph_compile(role):
    given = statistics(*problem())
    got = torch.compile(role, backend="aot_eager", fullgraph=True)(given)
    assert math.isclose(got.item(), role(given).item(), rel_tol=1e-12)
