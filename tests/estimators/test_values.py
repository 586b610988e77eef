"""The estimators' values: closed forms, a second way of computing each, invariances, what independent data gives."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from sib_fast.estimators import ESTIMATORS, cka, hsic_biased, hsic_gaussian, hsic_unbiased
from sib_fast.estimators.hsic_gaussian import gaussian_kernel


def rows(images: int, width: int = 20, seed: int = 0) -> Tensor:
    """Shapes: float64 [images, width]."""
    return torch.randn(images, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(a: Tensor) -> Tensor:
    return a / a.norm(dim=1, keepdim=True)


def gram(a: Tensor) -> Tensor:
    return a @ a.T


def close(got: Tensor, exact: float, rel: float = 1e-12) -> None:
    assert got.ndim == 0
    assert math.isclose(got.item(), exact, rel_tol=rel, abs_tol=1e-15), (got.item(), exact)


# ---- biased -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", [2, 3, 7])
def test_hsic_biased_is_the_trace_with_centring_matrices(images):
    a, b = rows(images), rows(images, seed=1)
    centring = torch.eye(images, dtype=torch.float64) - 1 / images
    exact = torch.trace(gram(unit(a)) @ centring @ gram(unit(b)) @ centring) / (images - 1) ** 2
    close(hsic_biased(gram(a), gram(b)), exact.item())


def test_hsic_biased_of_two_images_by_hand():
    # K = [[1, k], [k, 1]] centred is (1−k)/2·[[1, −1], [−1, 1]]; the trace of two such is (1−k)(1−l), and (N−1)² is 1.
    a = torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=torch.float64)
    b = torch.tensor([[0.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    close(hsic_biased(gram(a), gram(b)), (1 - 0.6) * (1 - 0.8))


def test_hsic_biased_of_orthogonal_rows():
    # K = I on both sides: tr(Z)/(N−1)² = 1/(N−1).
    eye = torch.eye(6, dtype=torch.float64)
    close(hsic_biased(9 * eye, 4 * eye), 1 / 5)


@pytest.mark.parametrize("images", [8, 32])
def test_independent_data_gives_about_one_over_n_minus_one(images):
    # Wide independent rows are nearly orthogonal, so both K are nearly I.
    draws = [hsic_biased(gram(rows(images, 4000, s)), gram(rows(images, 4000, s + 100))).item() for s in range(8)]
    assert math.isclose(sum(draws) / 8, 1 / (images - 1), rel_tol=0.02)


def test_row_scale_does_not_matter():
    a, b, scale = rows(5), rows(5, seed=1), torch.tensor([[1e-9], [1.0], [1e6], [3.0], [1e-3]], dtype=torch.float64)
    for estimator in ESTIMATORS.values():
        close(estimator(gram(scale * a), gram(b)), estimator(gram(a), gram(b)).item(), rel=1e-10)


# ---- unbiased -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", [4, 6])
def test_hsic_unbiased_is_the_u_statistic(images):
    # Song et al. 2012, by its definition: the mean over ordered 4-tuples of distinct images of
    # k_ij (l_ij + l_qr − 2 l_iq).
    k, el = gram(unit(rows(images, 5))), gram(unit(rows(images, 5, seed=1)))
    terms = [k[i, j] * (el[i, j] + el[q, r] - 2 * el[i, q]) for i, j, q, r in itertools.permutations(range(images), 4)]
    close(hsic_unbiased(gram(rows(images, 5)), gram(rows(images, 5, seed=1))), torch.stack(terms).mean().item(), rel=1e-10)


def test_hsic_unbiased_is_zero_in_the_mean_for_independent_data():
    draws = torch.stack([hsic_unbiased(gram(rows(8, 3, s)), gram(rows(8, 3, s + 5000))) for s in range(2000)])
    error = draws.std() / math.sqrt(len(draws))
    assert draws.mean().abs() < 3 * error
    # … while the biased one is many standard errors away from 0, so the bound above can fail.
    biased = torch.stack([hsic_biased(gram(rows(8, 3, s)), gram(rows(8, 3, s + 5000))) for s in range(200)])
    assert biased.mean() > 50 * error


def test_hsic_unbiased_is_positive_for_the_same_data():
    assert hsic_unbiased(gram(rows(8)), gram(rows(8))) > 0.01


# ---- cka ----------------------------------------------------------------------------------------------------------------


def test_cka_is_hsic_over_the_root_of_both():
    g, h = gram(rows(7)), gram(rows(7, seed=1))
    exact = hsic_biased(g, h) / (hsic_biased(g, g) * hsic_biased(h, h)).sqrt()
    close(cka(g, h), exact.item())


def test_cka_of_the_same_data_is_one():
    close(cka(gram(rows(7)), gram(rows(7))), 1.0)


def test_cka_is_symmetric_and_at_most_one():
    g, h = gram(rows(7)), gram(rows(7, seed=1))
    close(cka(g, h), cka(h, g).item())
    assert 0 < cka(g, h) < 1


def test_cka_is_invariant_to_rotation_and_scale():
    a, b = rows(7), rows(7, seed=1)
    rotation = torch.linalg.qr(rows(20, 20, seed=2)).Q
    exact = cka(gram(a), gram(b)).item()
    close(cka(gram(5 * a @ rotation), gram(b)), exact)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    close(cka(gram(a[order]), gram(b[order])), exact)


def test_cka_sees_no_alignment_with_identical_rows():
    close(cka(gram(rows(1).expand(5, -1)), gram(rows(5))), 0.0)


# ---- Gaussian -----------------------------------------------------------------------------------------------------------


def loop_kernel(a: Tensor, variance: float | None) -> Tensor:
    """exp(−‖a_i − a_j‖²/2σ²) pair by pair; σ² the median squared distance of distinct rows where None."""
    a, count = unit(a), len(a)
    squared = torch.zeros(count, count, dtype=torch.float64)
    for i, j in itertools.product(range(count), repeat=2):
        squared[i, j] = (a[i] - a[j]).square().sum()
    if variance is None:
        between = sorted(squared[i, j].item() for i in range(count) for j in range(i))
        variance = between[(len(between) - 1) // 2]
    return torch.exp(-squared / (2 * variance))


@pytest.mark.parametrize("sigma", [None, 0.3, 2.0])
@pytest.mark.parametrize("images", [2, 5, 6])
def test_hsic_gaussian_equals_a_loop(images, sigma):
    a, b = rows(images), rows(images, seed=1)
    variance = None if sigma is None else sigma**2
    k, el = loop_kernel(a, variance), loop_kernel(b, variance)
    centring = torch.eye(images, dtype=torch.float64) - 1 / images
    close(
        hsic_gaussian(gram(a), gram(b), sigma), (torch.trace(k @ centring @ el @ centring) / (images - 1) ** 2).item(), rel=1e-6
    )


def test_gaussian_kernel_sees_what_the_linear_one_does_not():
    # Once and twice round the circle: b is a function of a, and every linear covariance between the two is 0.
    angle = 2 * math.pi * torch.arange(40, dtype=torch.float64) / 40
    a, b = (torch.stack([torch.cos(k * angle), torch.sin(k * angle)], 1) for k in (1, 2))
    assert hsic_biased(gram(a), gram(b)).abs() < 1e-15
    assert hsic_gaussian(gram(a), gram(b), 0.5) > 1e-2


def test_bandwidth_is_not_differentiated():
    g = gram(unit(rows(5))).requires_grad_()
    diagonal = g.detach().diagonal()
    squared = diagonal[:, None] + diagonal - 2 * g.detach()
    upper = torch.triu_indices(5, 5, 1)
    sigma = squared[upper[0], upper[1]].median().sqrt().item()
    median, fixed = (torch.autograd.grad(gaussian_kernel(g, s)[0, 1], g)[0] for s in (None, sigma))
    assert torch.allclose(median, fixed, rtol=1e-12, atol=0)


def test_identical_rows_have_no_dependence_in_a_gaussian_kernel():
    close(hsic_gaussian(gram(rows(1).expand(4, -1)), gram(rows(4))), 0.0)


# ---- all ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
def test_symmetric_in_its_arguments_and_in_the_order_of_images(estimator):
    a, b = rows(6), rows(6, seed=1)
    exact = estimator(gram(a), gram(b)).item()
    close(estimator(gram(b), gram(a)), exact)
    close(estimator(gram(a.flip(0)), gram(b.flip(0))), exact)


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_values_propagate(estimator, bad):
    a, b = rows(5), gram(rows(5, seed=1))
    a[1, 3] = bad
    assert estimator(gram(a), b).isnan()
    assert estimator(b, gram(a)).isnan()
    for place in ((0, 0), (1, 2)):
        g = gram(rows(5))
        g[place] = math.nan
        assert estimator(g, b).isnan()


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
def test_fullgraph_compile(estimator):
    g, h = gram(rows(5)).requires_grad_(), gram(rows(5, seed=1))
    compiled = torch.compile(estimator, backend="aot_eager", fullgraph=True)
    got, exact = compiled(g, h), estimator(g, h)
    close(got, exact.item())
    grads = [torch.autograd.grad(value, g)[0] for value in (got, exact)]
    assert torch.allclose(*grads, rtol=1e-12, atol=1e-15)
